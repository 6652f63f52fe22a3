"""Exported ONNX folders beside those of onnxruntime-genai's own builder: size, speed and memory, in alternating runs.

    python benchmarks/shapes.py qwen3-0.6b -o DIR
    python benchmarks/genai.py DIR --genai-python ENV/bin/python [-o WORK -p 256 -n 64 -t 2 -r 3 --json FILE]
        [--export 'NAME=OPTIONS of qwen-quant export'] [--build 'NAME=KEY=VALUE … of the builder']

ENV has onnxruntime-genai, torch and transformers. Every folder runs in onnxruntime-genai and in plain onnxruntime with
I/O binding; each measurement is a process of its own. CPU time tells more than the clock where other programs run.
WORK keeps the folders for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from engine import cpu_name, genai, run

COMMAND = [sys.executable, "-m", "qwen_quant.cli"]
FIGURES = ("pp", "tg", "pp_cpu_ms", "tg_cpu_ms", "rss_mb")

# Keys and values stay in one buffer; of a prompt the graph computes the logits that it computes unasked.
PLAIN = """
import json, sys, time
from pathlib import Path
import numpy as np, onnxruntime
from onnxruntime import OrtValue
folder, threads, n_prompt, n_gen = Path(sys.argv[1]), *map(int, sys.argv[2:])
config = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
session = onnxruntime.InferenceSession(
    str(folder / config["filename"]), options, providers=["CPUExecutionProvider"]
)
binding, names = session.io_binding(), [value.name for value in session.get_inputs()]
shape = (1, config["num_key_value_heads"], n_prompt + n_gen, config["head_size"])
for name in names:
    if name.startswith("past_key_values"):
        buffer = OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
        binding.bind_ortvalue_input(name, buffer)
        binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
ids = lambda n: np.random.default_rng(n).integers(0, 4000, n)
def speed(name, n, size, past=0):
    pieces = ids(n).reshape(-1, size)
    start, cpu = time.perf_counter(), time.process_time()
    for piece in pieces:
        total = past + size
        feeds = {"input_ids": piece[None], "attention_mask": np.ones((1, total), np.int64),
                 "position_ids": np.arange(past, total)[None]}
        for key in names:
            if key in feeds:
                binding.bind_cpu_input(key, feeds[key])
        binding.bind_output("logits", "cpu")
        session.run_with_iobinding(binding)
        past = total
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {name: n / seconds, f"{name}_cpu_ms": 1000 * cpu / n}
for _ in range(2):  # first to warm up
    found = speed("pp", n_prompt, n_prompt) | speed("tg", n_gen, 1, n_prompt)
print(json.dumps(found))
"""


def exported(name: str, settings: str, options: argparse.Namespace) -> Path:
    """Our folder, int4 with weights rounded to nearest: speed does not depend on their values."""
    folder: Path = options.output / f"ours-{name}"
    if not folder.exists():
        command = [*COMMAND, "export", str(options.checkpoint), "--format", "onnx", "-o", str(folder)]
        basic = ["--type", "int4", "--no-calibration", "--no-verify", "--accuracy-level", "4"]
        subprocess.run([*command, *basic, *shlex.split(settings)], check=True)
    return folder


def built(name: str, settings: str, options: argparse.Namespace) -> Path:
    """The builder's folder; without `settings` its own defaults for int4 on the CPU."""
    folder: Path = options.output / f"builder-{name}"
    if not folder.exists():
        command = [options.genai_python, "-m", "onnxruntime_genai.models.builder"]
        paths = ["-i", str(options.checkpoint), "-o", str(folder), "-c", str(options.output / "cache")]
        extra = ["--extra_options", *shlex.split(settings)] if settings else []
        subprocess.run([*command, *paths, "-p", "int4", "-e", "cpu", *extra], check=True)
    return folder


def plain(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """One measurement of a folder in onnxruntime."""
    sizes = [str(size) for size in (options.threads, options.n_prompt, options.n_gen)]
    found, _, rss_mb = run([options.genai_python, "-c", PLAIN, str(folder), *sizes])
    return {**found, "rss_mb": rss_mb}


def programs_for(
    options: argparse.Namespace,
) -> tuple[dict[str, Callable[[], dict[str, float]]], dict[str, int]]:
    """What is measured by name, and the bytes of each folder."""
    folders = {}
    for make, kind, wanted in ((built, "builder", options.build), (exported, "ours", options.export)):
        for given in wanted:
            name, _, settings = given.partition("=")
            folders[f"{kind} {name}"] = make(name, settings, options)
    programs: dict[str, Callable[[], dict[str, float]]] = {}
    for name, folder in folders.items():
        programs[f"{name}, genai"] = partial(genai(options.genai_python, folder, options).measure, 0)
    for name, folder in folders.items():
        programs[f"{name}, onnxruntime"] = partial(plain, folder, options)
    return programs, {name: size_of(folder) for name, folder in folders.items()}


def size_of(folder: Path) -> int:
    """Bytes of the graph and its weights."""
    return sum(
        p.stat().st_size for p in folder.rglob("*") if p.suffix in (".onnx", ".data") or "onnx_data" in p.name
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--genai-python", required=True, metavar="ENV/bin/python")
    parser.add_argument("--export", action="append", metavar="NAME=OPTIONS")
    parser.add_argument("--build", action="append", metavar="NAME=KEY=VALUE …")
    parser.add_argument("-o", "--output", type=Path, default=Path("/tmp/qwen-quant-genai"))
    parser.add_argument("-p", "--n-prompt", type=int, default=256)
    parser.add_argument("-n", "--n-gen", type=int, default=64)
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count())
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--make-only", action="store_true", help="write the folders and stop")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.export = options.export or ["default"]
    options.build = options.build or ["default"]
    return options


def table(medians: dict[str, dict[str, float]]) -> str:
    """Markdown: each program's figures, and its speed (by the clock and by CPU time) over that of the first one that
    has the same runtime."""
    lines = [
        f"| folder | {' | '.join(FIGURES)} | pp and tg over the first | by CPU time |",
        "|---|" + "---:|" * 7,
    ]
    for name, found in medians.items():
        first = next(medians[other] for other in medians if other.split(", ")[1] == name.split(", ")[1])
        clock = " / ".join(f"{found[figure] / first[figure]:.2f}" for figure in ("pp", "tg"))
        cpu = " / ".join(f"{first[figure] / found[figure]:.2f}" for figure in ("pp_cpu_ms", "tg_cpu_ms"))
        figures = " | ".join(f"{found[figure]:.1f}" for figure in FIGURES)
        lines.append(f"| {name} | {figures} | {clock} | {cpu} |")
    return "\n".join(lines)


def main() -> None:
    options = parsed()
    options.output.mkdir(parents=True, exist_ok=True)
    programs, sizes = programs_for(options)
    for name, nbytes in sizes.items():
        print(f"{name}: {nbytes / 1e6:.1f} MB", flush=True)
    if options.make_only:
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for _ in range(options.repetitions):
        for name, measure in programs.items():
            runs[name].append(measure())
            print(f"{name}: " + ", ".join(f"{k} {v:.1f}" for k, v in runs[name][-1].items()), flush=True)
    medians = {
        name: {figure: statistics.median(entry[figure] for entry in found) for figure in FIGURES}
        for name, found in runs.items()
    }
    print(f"\n{table(medians)}")
    if options.json:
        report = {"cpu": cpu_name(), "command": sys.argv, "bytes": sizes, "runs": runs, "medians": medians}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
