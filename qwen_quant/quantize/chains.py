"""Solving rows one after the other, each making up for the errors of those before it.

With second moments G = A Aᵀ of the gradients by the rows' outputs, and H = L Lᵀ of the inputs, the loss tr(G D H Dᵀ) is
|Aᵀ D L|². A is lower triangular, so row n of Aᵀ D is D_n and what the rows after n add to it: row n is solved as ever,
but for W_n + Σ A_mn / A_nn D_m over the rows m > n. Rounding each entry in the order of both triangles (Tseng et al.
2025, arXiv:2505.22988) makes the same choices.

Shapes: E problems, N rows in C chains of R that have nothing to do with each other, K columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwen_quant.grids.base import Scales
from qwen_quant.quantize.factor import factorise
from qwen_quant.quantize.rows import Rounded, codes_and_scales, joined

DAMPING = 0.1  # of G: between 0.01 and 1 the divergence hardly differs (docs/quantization.md)
# Rows that are solved together, at least: they do not make up for each other, but a few alone are slow to solve.
TOGETHER = 16
STEPS = 64  # at most, of that many or more rows each


def in_chains(weights: Tensor, moments: Tensor, solve: Callable[[Tensor], list[Rounded]]) -> Rounded:
    """What `solve` finds for rows [E, N, K], in pieces, when those of each chain are solved from the last to the first.

    `moments` is G [C, R, R] of the N = C * R rows.
    """
    c, r, _ = moments.shape
    spread = factorise(moments, DAMPING).spread  # [C, R, R]
    chains = weights.unflatten(1, (c, r))  # [E, C, R, K]
    missed = torch.empty_like(chains)
    steps: list[list[Tensor]] = []  # codes and scales [E, C, rows, ...]
    for stop in range(r, 0, -_rows_at_once(c, r)):
        rows = slice(max(0, stop - _rows_at_once(c, r)), stop)
        more = torch.matmul(spread[:, stop:, rows].mT, missed[:, :, stop:])  # what they make up for
        parts = solve((chains[:, :, rows] + more).flatten(1, 2))
        codes, scales = codes_and_scales(parts)
        [found] = joined([(part.missed,) for part in parts])
        missed[:, :, rows] = found.unflatten(1, (c, -1)) - more
        steps.insert(0, [x.unflatten(1, (c, -1)) for x in (codes, scales.scale, scales.offset)])
    codes, scale, offset = (torch.cat(same, dim=2).flatten(1, 2) for same in zip(*steps, strict=True))
    return Rounded(codes, Scales(scale, offset), missed.flatten(1, 2))


def _rows_at_once(chains: int, rows: int) -> int:
    """Rows of each chain that are solved together."""
    return max(1, max(TOGETHER, -(-chains * rows // STEPS)) // chains)
