"""Solving rows one after the other, each making up for the errors of those before it.

With second moments G = A Aᵀ of the gradients by the rows' outputs, and H = L Lᵀ of the inputs, the loss tr(G D H Dᵀ) is
|Aᵀ D L|². A is lower triangular, so row n of Aᵀ D is D_n and what the rows after n add to it: row n is solved as ever,
but for W_n + Σ A_mn / A_nn D_m over the rows m > n. Rounding each entry in the order of both triangles (Tseng et al.
2025, arXiv:2505.22988) makes the same choices. Rows go in order of falling G_nn, as columns do in that of diag(H).

Shapes: E problems, N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwen_quant.grids.base import Scales
from qwen_quant.quantize.compensate import select
from qwen_quant.quantize.factor import factorise
from qwen_quant.quantize.rows import Rounded, codes_and_scales, joined

DAMPING = 0.1  # of G: between 0.01 and 1 the divergence hardly differs (docs/quantization.md)
# Rows that are solved together, at least: they do not make up for each other, but a few alone are slow to solve.
TOGETHER = 8
STEPS = 64  # at most, of that many or more rows each


def in_chain(weights: Tensor, moments: Tensor, solve: Callable[[Tensor], list[Rounded]]) -> Rounded:
    """What `solve` finds for rows [E, N, K], in pieces, when they are solved one after the other; `moments` is G
    [N, N]."""
    n = len(moments)
    order = torch.argsort(moments.diagonal(), stable=True)  # solved from the last to the first
    spread = factorise(
        select(select(moments[None], order[None]).mT, order[None]), DAMPING
    ).spread  # [1, N, N]
    missed = torch.empty_like(weights)  # in this order, as all within the loop
    steps: list[Rounded] = []
    step = max(TOGETHER, -(-n // STEPS))
    for stop in range(n, 0, -step):
        rows = slice(max(0, stop - step), stop)
        more = torch.matmul(spread[:, stop:, rows].mT, missed[:, stop:])  # what they make up for
        parts = solve(weights[:, order[rows]] + more)
        [found] = joined([(part.missed,) for part in parts])
        missed[:, rows] = found - more
        steps.insert(0, Rounded(*codes_and_scales(parts), missed[:, rows]))
    codes, scales = codes_and_scales(steps)
    back = order.argsort()
    return Rounded(codes[:, back], Scales(scales.scale[:, back], scales.offset[:, back]), missed[:, back])
