"""Speed and memory of the engine beside llama.cpp's and onnxruntime-genai's, in alternating runs.

    python benchmarks/shapes.py qwen3-0.6b -o DIR
    qwen-quant export DIR --format gguf --type Q4_0 --no-calibration -o q4_0.gguf
    python benchmarks/engine.py q4_0.gguf --llama-bench PATH [--genai-python ENV/bin/python --genai-model FOLDER]
        [-p 512 -n 64 -d 0,4096 -t 2 -r 5 --json FILE]

Each measurement is a process of its own, one at a time, and the programs take turns. `--llama-bench` may be given
several times, as NAME="PATH OPTIONS", for forks of llama.cpp; `--genai-model` once for each file, in the same order.
The time to the first token is that of a whole process, from its start to the end of a one-token prompt.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GENAI = """
import json, sys, time
import numpy as np, onnxruntime_genai as og
folder, threads, depth, n_prompt, n_gen = sys.argv[1], *map(int, sys.argv[2:])
config = og.Config(folder)
session = {"intra_op_num_threads": threads}
config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
model = og.Model(config)
params = og.GeneratorParams(model)
params.set_search_options(max_length=depth + max(n_prompt, n_gen) + 1)
generator = og.Generator(model, params)
ids = lambda n: np.random.default_rng(n).integers(0, 4000, n).astype(np.int32)
def speed(name, n, size):
    pieces = ids(n).reshape(-1, size)
    generator.rewind_to(depth)
    start, cpu = time.perf_counter(), time.process_time()
    for piece in pieces:
        generator.append_tokens(piece)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {name: n / seconds, f"{name}_cpu_ms": 1000 * cpu / n} if n else {name: 0}
if depth:
    generator.append_tokens(ids(depth))
found = speed("pp", n_prompt, n_prompt) | speed("tg", n_gen, 1)  # to warm up
found = speed("pp", n_prompt, n_prompt) | speed("tg", n_gen, 1) if n_gen else found
print(json.dumps(found))
"""


@dataclass
class Runs:
    """Measurements of one program on one file, an entry for each round: tokens per second, CPU milliseconds a token
    and MB by depth, seconds to the first token, and for ours the limits of the machine in tokens per second."""

    pp: dict[int, list[float]] = field(default_factory=dict)
    tg: dict[int, list[float]] = field(default_factory=dict)
    pp_cpu_ms: dict[int, list[float]] = field(default_factory=dict)
    tg_cpu_ms: dict[int, list[float]] = field(default_factory=dict)
    rss_mb: dict[int, list[float]] = field(default_factory=dict)
    pp_limit: dict[int, list[float]] = field(default_factory=dict)
    tg_limit: dict[int, list[float]] = field(default_factory=dict)
    first_token_s: list[float] = field(default_factory=list)

    def add(self, depth: int, found: dict[str, float]) -> None:
        for name, value in found.items():
            getattr(self, name).setdefault(depth, []).append(value)


@dataclass(frozen=True)
class Program:
    """`measure(depth)` gives pp, tg and rss_mb; `first_token()` is the command that ends with the first token."""

    name: str
    measure: Callable[[int], dict[str, float]]
    first_token: list[str]


def run(command: list[str]) -> tuple[Any, float, float]:
    """The JSON that a command prints (None for other output), its wall seconds, and its peak RSS in MB.

    Python programs find their bytecode, as those of an installed package do. Exits with its messages when it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment.setdefault("PYTHONPYCACHEPREFIX", str(Path(tempfile.gettempdir()) / "engine-bytecode"))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        began = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        if status:
            log.seek(0)
            sys.exit(log.read().decode(errors="replace")[-4000:] + f"\n{' '.join(command)} failed")
        out.seek(0)
        text = out.read().decode()
    try:
        return json.loads(text), seconds, usage.ru_maxrss * 1024 / 1e6
    except ValueError:
        return None, seconds, usage.ru_maxrss * 1024 / 1e6


def ours(file: Path, options: argparse.Namespace) -> Program:
    command = [sys.executable, "-m", "qwen_quant.cli"]
    run([*command, "bench", str(file), "-p", "1", "-n", "0", "-r", "1"])  # ends with an error for wrong text
    size = ["-p", str(options.n_prompt), "-n", str(options.n_gen), "-t", str(options.threads)]

    def measure(depth: int) -> dict[str, float]:
        bench = ["bench", str(file), *size, "-d", str(depth), "-r", "1", "--no-check", "--json"]
        found, _, _ = run([*command, *bench])
        return {
            "pp": found["pp_tok_s"],
            "tg": found["tg_tok_s"],
            "rss_mb": found["rss_mb"],
            "pp_limit": found["pp_tok_s"] / found["int8_fraction"],
            "tg_limit": found["tg_tok_s"] / found["bandwidth_fraction"],
        }

    first = ["run", str(file), "-p", "a", "--raw", "-n", "1", "-t", str(options.threads)]
    return Program("qwen-quant", measure, [*command, *first])


def llama(name: str, bench: list[str], file: Path, options: argparse.Namespace) -> Program:
    command = [*bench, "-m", str(file), "-t", str(options.threads), "-r", "1", "-o", "json"]
    known = subprocess.run([bench[0], "--help"], capture_output=True, text=True).stdout

    def size(depth: int) -> list[str]:
        # ik_llama.cpp generates after a prompt, but takes no prompt after another.
        if depth and "--n-depth" not in known:
            return ["-p", "0", "-n", "0", "-gp", f"{depth},{options.n_gen}"]
        return ["-p", str(options.n_prompt), "-n", str(options.n_gen), *(["-d", str(depth)] if depth else [])]

    def measure(depth: int) -> dict[str, float]:
        found, _, rss_mb = run([*command, *size(depth)])
        return {"pp": math.nan, "rss_mb": rss_mb} | {
            "tg" if test["n_gen"] else "pp": statistics.mean(test["samples_ts"]) for test in found
        }

    cold = ["--no-warmup"] if "--no-warmup" in known else ["-w", "0"]
    return Program(name, measure, [*command, "-p", "1", "-n", "0", *cold])


def genai(python: str, folder: Path, options: argparse.Namespace) -> Program:
    command = [python, "-c", GENAI, str(folder), str(options.threads)]

    def measure(depth: int) -> dict[str, float]:
        found, _, rss_mb = run([*command, str(depth), str(options.n_prompt), str(options.n_gen)])
        return found | {"rss_mb": rss_mb}

    return Program("onnxruntime-genai", measure, [*command, "0", "1", "0"])


def programs_for(file: Path, folder: Path | None, options: argparse.Namespace) -> list[Program]:
    found = [ours(file, options)]
    for given in options.llama_bench:
        name, _, command = given.rpartition("=")
        found.append(llama(name or "llama.cpp", shlex.split(command), file, options))
    if folder is not None:
        found.append(genai(options.genai_python, folder, options))
    return found


def measure(programs: list[Program], options: argparse.Namespace) -> dict[str, Runs]:
    """All rounds; in each, every program takes its turn at every depth."""
    results = {program.name: Runs() for program in programs}
    for _ in range(options.repetitions):
        for program in programs:
            _, seconds, _ = run(program.first_token)
            results[program.name].first_token_s.append(seconds)
        for depth, program in itertools.product(options.depths, programs):
            found = program.measure(depth)
            results[program.name].add(depth, found)
            print(
                f"{program.name} at {depth}: " + ", ".join(f"{k} {v:.1f}" for k, v in found.items()),
                flush=True,
            )
    return results


def medians(runs: Runs, depths: list[int]) -> list[float]:
    """Prompt and generation at each depth, seconds to the first token, peak memory at the greatest depth."""
    speeds = [statistics.median(runs_of[depth]) for depth in depths for runs_of in (runs.pp, runs.tg)]
    return [*speeds, statistics.median(runs.first_token_s), statistics.median(runs.rss_mb[depths[-1]])]


def table(results: dict[str, dict[str, Runs]], options: argparse.Namespace) -> str:
    """Markdown: medians of every program, the machine's limits, and our figures over each peer's."""
    names = [
        f"{name}{size}" + (f" @ {depth}" if depth else "")
        for depth in options.depths
        for name, size in (("pp", options.n_prompt), ("tg", options.n_gen))
    ]
    lines = [["file", "program", *names, "first token s", "peak MB"]]
    lines.append(["---", "---", *["---:"] * (len(names) + 2)])
    for file, by_program in results.items():
        values = {name: medians(runs, options.depths) for name, runs in by_program.items()}
        for name, found in values.items():
            lines.append(
                [file, name, *(f"{v:.1f}" for v in found[:-2]), f"{found[-2]:.2f}", f"{found[-1]:.0f}"]
            )
        own = by_program["qwen-quant"]
        limits = [limit[depth] for depth in options.depths for limit in (own.pp_limit, own.tg_limit)]
        lines.append([file, "limit of the machine", *(f"{statistics.median(v):.1f}" for v in limits), "", ""])
        for name, found in values.items():
            if name != "qwen-quant":
                ratios = [f"{a / b:.2f}" for a, b in zip(values["qwen-quant"], found, strict=True)]
                lines.append([file, f"qwen-quant / {name}", *ratios])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.gguf")
    parser.add_argument("--llama-bench", action="append", default=[], metavar="[NAME=]COMMAND")
    parser.add_argument("--genai-python", default=sys.executable)
    parser.add_argument("--genai-model", action="append", default=[], type=Path, metavar="FOLDER")
    parser.add_argument("-p", "--n-prompt", type=int, default=512)
    parser.add_argument("-n", "--n-gen", type=int, default=64)
    parser.add_argument("-d", "--depths", default="0,4096")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count())
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.depths = sorted(int(depth) for depth in options.depths.split(","))
    if options.n_prompt < 1 or options.n_gen < 1:
        parser.error("-p and -n: both are measured, give at least 1")
    return options


def main() -> None:
    options = parsed()
    results: dict[str, dict[str, Runs]] = {}
    for file, folder in itertools.zip_longest(options.files, options.genai_model[: len(options.files)]):
        results[file.stem] = measure(programs_for(file, folder, options), options)
    markdown = table(results, options)
    print(f"\n{markdown}")
    if options.json:
        report = {
            "cpu": cpu_name(),
            "command": sys.argv,
            "runs": {file: {name: vars(runs) for name, runs in by.items()} for file, by in results.items()},
            "table": markdown.splitlines(),
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
