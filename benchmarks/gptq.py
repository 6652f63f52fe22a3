"""Time and memory of GPTQ, ours against GPTQModel's, the same windows on the same random checkpoint.

    python benchmarks/gptq.py CHECKPOINT --peer-python ENV/bin/python [--samples 32 --seq-len 512 -r 3 --json FILE]

Make the checkpoint with benchmarks/shapes.py and the environment with tests/interop/run.py. Runs alternate; each is
a process of its own, so that wall time and peak RSS count everything a user waits and pays for.
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

PEER = """
import sys, numpy as np
from gptqmodel import GPTQModel, QuantizeConfig
model, windows, output = sys.argv[1:]
rows = np.load(windows).tolist()
data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
loaded = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=128))
loaded.quantize(data, batch_size=1)
loaded.save(output)
"""


def write_windows(options: argparse.Namespace, path: Path) -> None:
    """The windows that our `gptq` samples from the built-in text, as an array for the peer."""
    from qwen_quant import calib_data
    from qwen_quant.checkpoint import resolve_model
    from qwen_quant.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(resolve_model(str(options.checkpoint)))
    windows = calib_data.sample(calib_data.load("builtin"), tokenizer, options.samples, options.seq_len)
    np.save(path, windows)


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall seconds and peak RSS in GB of a command. Exits with its output when it fails."""
    with tempfile.TemporaryFile() as log:
        began = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
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
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("-r", "--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, list[tuple[float, float]]] = {"qwen-quant": [], "GPTQModel": []}
    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        windows = folder / "windows.npy"
        write_windows(options, windows)
        size = ["--num-samples", str(options.samples), "--seq-len", str(options.seq_len)]
        ours = [sys.executable, "-m", "qwen_quant.cli", "gptq", str(options.checkpoint), *size, "--json"]
        peer = [str(options.peer_python), "-c", PEER, str(options.checkpoint), str(windows)]
        for _ in range(options.repeat):
            for name, command in (
                ("qwen-quant", [*ours, "-o", str(folder / "ours")]),
                ("GPTQModel", [*peer, str(folder / "peer")]),
            ):
                results[name].append(timed(command, environment))
                print(f"{name:12s} {results[name][-1][0]:7.1f} s  {results[name][-1][1]:.2f} GB", flush=True)
                shutil.rmtree(folder / ("ours" if name == "qwen-quant" else "peer"))
    summary = {
        name: {
            "seconds": statistics.median(r[0] for r in rows),
            "peak_rss_gb": statistics.median(r[1] for r in rows),
        }
        for name, rows in results.items()
    }
    ratios = {
        key: summary["qwen-quant"][key] / summary["GPTQModel"][key] for key in ("seconds", "peak_rss_gb")
    }
    report = {"checkpoint": str(options.checkpoint), "median": summary, "ours/peer": ratios, "runs": results}
    print(json.dumps({"median": summary, "ours/peer": ratios}, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
