"""Exported ONNX folders beside those of onnxruntime-genai's own builder: size, speed and memory, in alternating runs.

    python benchmarks/shapes.py qwen3-0.6b -o DIR
    python benchmarks/genai.py DIR --genai-python ENV/bin/python [-o WORK -p 512 -n 64 -t 2 -r 3 --json FILE]
        [--export 'NAME=OPTIONS of qwen-quant export'] [--build 'NAME=KEY=VALUE … of the builder']

ENV has onnxruntime-genai, torch and transformers. Both kinds of folders run in onnxruntime-genai, ours also in our own
Session; each measurement is a process of its own. WORK keeps the folders for the next time.
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
from pathlib import Path

from engine import cpu_name, genai, run

COMMAND = [sys.executable, "-m", "qwen_quant.cli"]
FIGURES = ("pp", "tg", "rss_mb")


def exported(name: str, settings: str, options: argparse.Namespace) -> Path:
    """Our folder, int4 with weights rounded to nearest: speed does not depend on their values."""
    folder: Path = options.output / f"ours-{name}"
    if not folder.exists():
        command = [*COMMAND, "export", str(options.checkpoint), "--format", "onnx", "-o", str(folder)]
        basic = ["--type", "int4", "--no-calibration", "--no-verify"]
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


def session(folder: Path, options: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """One measurement of a folder in our Session."""
    sizes = ["-p", str(options.n_prompt), "-n", str(options.n_gen), "-t", str(options.threads)]

    def measure() -> dict[str, float]:
        found, _, _ = run([*COMMAND, "bench", str(folder), *sizes, "-r", "1", "--no-check", "--json"])
        return {"pp": found["pp_tok_s"], "tg": found["tg_tok_s"], "rss_mb": found["rss_mb"]}

    return measure


def programs_for(
    options: argparse.Namespace,
) -> tuple[dict[str, Callable[[], dict[str, float]]], dict[str, int]]:
    """What is measured by name, and the bytes of each folder."""
    programs: dict[str, Callable[[], dict[str, float]]] = {}
    sizes = {}
    for given in options.build:
        name, _, settings = given.partition("=")
        folder = built(name, settings, options)
        programs[f"builder {name}"] = lambda f=folder: genai(options.genai_python, f, options).measure(0)
        sizes[f"builder {name}"] = size_of(folder)
    for given in options.export:
        name, _, settings = given.partition("=")
        folder = exported(name, settings, options)
        programs[f"ours {name}"] = lambda f=folder: genai(options.genai_python, f, options).measure(0)
        programs[f"ours {name}, Session"] = session(folder, options)
        sizes[f"ours {name}"] = size_of(folder)
    return programs, sizes


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
    parser.add_argument("-p", "--n-prompt", type=int, default=512)
    parser.add_argument("-n", "--n-gen", type=int, default=64)
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count())
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--make-only", action="store_true", help="write the folders and stop")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.export = options.export or ["default"]
    options.build = options.build or ["default"]
    return options


def main() -> None:
    options = parsed()
    options.output.mkdir(parents=True, exist_ok=True)
    programs, sizes = programs_for(options)
    for name, nbytes in sizes.items():
        print(f"{name}: {nbytes / 1e6:.1f} MB")
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
    first = medians[next(iter(medians))]
    print(
        f"\n| folder | {' | '.join(FIGURES)} | pp and tg over {next(iter(medians))}'s |\n|---|---:|---:|---:|---:|"
    )
    for name, found in medians.items():
        ratios = " / ".join(f"{found[figure] / first[figure]:.2f}" for figure in FIGURES[:2])
        print(f"| {name} | {' | '.join(f'{found[figure]:.1f}' for figure in FIGURES)} | {ratios} |")
    if options.json:
        report = {"cpu": cpu_name(), "command": sys.argv, "bytes": sizes, "runs": runs, "medians": medians}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
