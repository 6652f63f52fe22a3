"""Time and memory of GPTQ beside other quantizers, the same windows on the same random checkpoint.

    python benchmarks/gptq.py CHECKPOINT --peer GPTQModel=ENV/bin/python [--peer llm-compressor=ENV/bin/python]
        [--peer-dtype float32 --samples 32 --seq-len 512 -r 3 --only NAME --json FILE]

Make the checkpoint with benchmarks/shapes.py and GPTQModel's environment with tests/interop/run.py. Runs alternate;
each is a process of its own, so that wall time and peak RSS count everything a user waits and pays for. With `--json`
runs are added to those in FILE, so that long ones can be spread over calls with `--only`.

Peers compute in the checkpoint's BF16 unless `--peer-dtype` says otherwise: on a CPU without BF16 units their
products then run at about a hundredth of the speed of FP32, and float32 is what a user there would choose.

We run twice: with `--correct-targets`, the default, for which half of the windows pass through each layer in full
precision as well, and without, which is the work that peers do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from peers import ENVIRONMENT, SCRIPTS, peer_command, peer_of, sampled_windows

OURS = "qwen-quant"
PLAIN = "--no-correct-targets"
SAME_WORK = f"{OURS} {PLAIN}"


def timed(command: list[str], folder: str) -> tuple[float, float]:
    """Wall seconds and peak RSS in GB of a command, run in `folder`. Exits with its output when it fails."""
    with tempfile.TemporaryFile() as log:
        began = time.monotonic()
        process = subprocess.Popen(command, env=ENVIRONMENT, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        if status:
            log.seek(0)
            sys.exit(log.read().decode(errors="replace")[-4000:] + f"\n{command[0]} failed")
    return seconds, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=lambda text: Path(text).resolve())
    parser.add_argument("--peer", type=peer_of, action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--peer-dtype", default="bfloat16")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("-r", "--repeat", type=int, default=3)
    parser.add_argument(
        "--only", action="append", choices=[OURS, SAME_WORK, *SCRIPTS], help="Run these only."
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, list[list[float]]] = {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())["runs"]
    with tempfile.TemporaryDirectory() as scratch:
        windows, output = Path(scratch) / "windows.npy", Path(scratch) / "output"
        np.save(windows, sampled_windows(str(options.checkpoint), options.samples, options.seq_len))
        size = ["--num-samples", str(options.samples), "--seq-len", str(options.seq_len)]
        ours = [sys.executable, "-m", "qwen_quant.cli", "gptq", str(options.checkpoint), *size, "--json"]
        commands = {OURS: [*ours, "-o", str(output)]}
        commands[SAME_WORK] = [*commands[OURS], PLAIN]
        for name, python in options.peer:
            commands[name] = peer_command(
                name, python, options.checkpoint, windows, output, options.peer_dtype
            )
        for _ in range(options.repeat):
            for name in options.only or commands:
                seconds, gigabytes = timed(commands[name], scratch)
                results.setdefault(name, []).append([seconds, gigabytes])
                print(f"{name:32s} {seconds:7.1f} s  {gigabytes:.2f} GB", flush=True)
                shutil.rmtree(output, ignore_errors=True)
                if options.json:
                    options.json.write_text(json.dumps(report(options, results), indent=2) + "\n")
    print(
        json.dumps({key: value for key, value in report(options, results).items() if key != "runs"}, indent=2)
    )


def report(options: argparse.Namespace, results: dict[str, list[list[float]]]) -> dict[str, object]:
    """Medians, each of ours over each peer's, and every run."""
    median = {
        name: dict(
            zip(("seconds", "peak_rss_gb"), map(statistics.median, zip(*runs, strict=True)), strict=True)
        )
        for name, runs in results.items()
    }
    ratios = {
        f"{mine} / {peer}": {key: median[mine][key] / value for key, value in found.items()}
        for mine in (OURS, SAME_WORK)
        for peer, found in median.items()
        if mine in median and peer not in (OURS, SAME_WORK)
    }
    return {"checkpoint": str(options.checkpoint), "median": median, "ours/peer": ratios, "runs": results}


if __name__ == "__main__":
    main()
