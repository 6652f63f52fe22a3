"""What this machine does in a second when nothing else runs on it, timed for about one, and from that how long a
plan takes.

On a CPU one thread is timed, by the time that it computes and not by the clock: what other programs take away does
not count, and threads do not wait for each other. All threads are taken to do as much each.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from qwen_quant.grids.base import AffineGrid
from qwen_quant.quantize.calibration import fast_matmul
from qwen_quant.quantize.factor import factorise
from qwen_quant.quantize.gptq import solve
from qwen_quant.quantize.plan_layer import Work, solver_work

ROWS, COLUMNS = 1024, 512  # of the weight that is solved to see how fast rounding is
SIDE = 1024  # of the matrices that are multiplied and factorised
TRANSFER = 400e6  # bytes a second of reading, hashing and packing: a guess, they are a small part


@dataclass(frozen=True)
class Speed:
    """Operations in a second, as `Work` counts them."""

    matmul: float
    factor: float
    solved: float
    rounded: float

    def seconds(self, work: Work) -> dict[str, float]:
        """How long each part of `work` takes."""
        return {
            "matmul": work.matmul / self.matmul,
            "factorisation": work.factor / self.factor,
            "rounding": work.solved / self.solved + work.rounded / self.rounded,
            "transfer": work.transferred / TRANSFER,
        }


def measure_speed(grids: Mapping[AffineGrid, float], device: torch.device) -> Speed:
    """Time a matrix product, a factorisation, and the rounding of a small weight, in FP32 on `device`.

    `grids` are those that the weights are rounded on, each with its number of weights.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = _one_thread(grids, device)
    finally:
        torch.set_num_threads(threads)
    if device.type != "cpu":
        return found
    # Plain rounding keeps to one thread.
    return Speed(threads * found.matmul, threads * found.factor, threads * found.solved, found.rounded)


def _one_thread(grids: Mapping[AffineGrid, float], device: torch.device) -> Speed:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SIDE, SIDE, generator=generator).to(device)
    hessian = x.T @ x / SIDE + torch.eye(SIDE, device=device)
    small = hessian[:COLUMNS, :COLUMNS].contiguous()
    weight = torch.randn(ROWS, COLUMNS, generator=generator).to(device)
    with fast_matmul(), torch.no_grad():
        matmul = 2 * SIDE**3 / _best(lambda: x @ x, device)
        factor = SIDE**3 / 3 / _best(lambda: factorise(hessian[None], 0.01), device)
        rest = solver_work(ROWS, COLUMNS) / matmul + COLUMNS**3 / 3 / factor
        solving = rounding = 0.0  # seconds for all weights of the plan
        for grid, count in grids.items():
            whole = _best(partial(solve, [weight], small, grid), device)
            solving += count / weight.numel() * max(whole - rest, whole / 10)
            plain = _best(partial(grid.uncalibrated, weight.cpu().numpy()), torch.device("cpu"))
            rounding += count / weight.numel() * plain
    total = sum(grids.values()) or 1
    return Speed(matmul, factor, total / max(solving, 1e-9), total / max(rounding, 1e-9))


def _best(call: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """Seconds of the quickest of a few calls, after one that warms up."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    seconds = []
    for _ in range(times + 1):
        began = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(clock() - began)
    return max(min(seconds[1:]), 1e-6)  # a coarse clock may see nothing


def resident_bytes() -> float:
    """Memory that this process holds now; where the system does not say, the most it has held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
