"""Seconds to solve the experts of one layer: as stacks against one by one, by the same code.

    python benchmarks/experts.py [--experts 128 --rows 768 --columns 2048 --threads 1]

The stacks are those that the quantizer forms, of as many experts as its memory bound allows.
"""

from __future__ import annotations

import argparse
import time

import torch

from qwen_quant.grids import IntGrid
from qwen_quant.moe import MoESpec
from qwen_quant.quantize.calibration import fast_matmul
from qwen_quant.quantize.experts import groups_of_experts
from qwen_quant.quantize.gptq import solve, solve_stack


def problems(experts: range, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random weights [E, rows, columns] and Hessians [E, columns, columns] with a few large channels."""
    generator = torch.Generator().manual_seed(experts.start)
    x = torch.randn(2 * columns, columns, generator=generator)
    x[:, ::17] *= 6
    moments = (x.T @ x / len(x)).expand(len(experts), -1, -1)
    scales = 0.5 + torch.rand(len(experts), columns, generator=generator)
    weights = torch.randn(len(experts), rows, columns, generator=generator) / columns**0.5
    return weights, moments * scales[:, :, None] * scales[:, None, :]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    grid = IntGrid(4, 128)
    moe = MoESpec(options.experts, 1, options.rows, None, True, (0,))
    alone = stacked = 0.0
    with fast_matmul(), torch.no_grad():
        for experts in groups_of_experts(moe, options.columns):
            weights, hessian = problems(experts, options.rows, options.columns)
            began = time.perf_counter()
            solve_stack([weights], hessian, grid)
            middle = time.perf_counter()
            for weight, moments in zip(weights, hessian, strict=True):
                solve([weight], moments, grid)
            stacked += middle - began
            alone += time.perf_counter() - middle
    print(
        f"{options.experts} experts of {options.rows} x {options.columns}: stacked {stacked:.1f} s, "
        f"one by one {alone:.1f} s, ratio {stacked / alone:.2f}"
    )


if __name__ == "__main__":
    main()
