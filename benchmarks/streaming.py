"""Memory and time of GPTQ on large shapes, predicted by --dry-run and measured.

    python benchmarks/streaming.py qwen3-30b-a3b qwen2.5-7b --folder DIR [--samples 8 --seq-len 512 --json FILE]

Checkpoints are made in DIR where they are not there yet, cut to two layers; each run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import shapes


def run(arguments: list[str], threads: int) -> tuple[dict[str, Any], float, float]:
    """The JSON of a command, its wall seconds and peak RSS in MB. Exits with its message when it fails."""
    command = [sys.executable, "-m", "qwen_quant.cli", *arguments, "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    began = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return json.loads(text), time.monotonic() - began, usage.ru_maxrss * 1024 / 1e6


def measure(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Predicted and measured memory (MB) and time (s) of one shape, and the time of all its layers."""
    folder, output = options.folder / shape, options.folder / f"{shape}-gptq"
    if not (folder / "config.json").exists():
        shapes.write(shapes.config_of(shape, options.layers, options.vocab_size), folder)
    size = ["--num-samples", str(options.samples), "--seq-len", str(options.seq_len)]
    command = ["gptq", str(folder), "-o", str(output), *size]
    plan, _, _ = run([*command, "--dry-run"], options.threads)
    done, seconds, peak = run([*command, "--overwrite"], options.threads)
    shutil.rmtree(output)
    layers = done["layer_seconds"]
    each = sum(layer["seconds"] for layer in layers) / len(layers)
    return {
        "peak_rss_mb": peak,
        "predicted_peak_rss_mb": plan["peak_rss_mb"],
        "predicted_worst_stage": plan["worst_stage"],
        "predicted/measured memory": plan["peak_rss_mb"] / peak,
        "seconds": seconds,
        "predicted_seconds": plan["seconds"],
        "predicted/measured time": plan["seconds"] / seconds,
        "layer_seconds": layers,
        "extrapolated_seconds": seconds + each * (shapes.SHAPES[shape]["num_hidden_layers"] - len(layers)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="+", choices=shapes.SHAPES)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = {shape: measure(shape, options) for shape in options.shapes}
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
