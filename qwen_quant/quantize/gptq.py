"""The GPTQ solver (Frantar et al. 2022, arXiv:2210.17323) over any affine grid.

Minimises tr((W - Q) H (W - Q)ᵀ) column by column: each column is rounded and its error is spread over the
columns not yet rounded, by the Cholesky factor of H⁻¹. Columns go in order of falling diag(H) ("act-order");
unless `desc_act` is set the groups stay in their stored order, so that no reader needs an index for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_quant.grids.base import AffineGrid, QuantizedTensor, Scales

BLOCK = 128  # columns whose errors are spread at once into the rest
DAMPING_STEPS = 4  # each ten times the one before, when the factorisation fails


@dataclass
class Solution:
    """A solved weight and how far it is off: relative output errors tr(E H Eᵀ) / tr(W H Wᵀ)."""

    tensor: QuantizedTensor
    error: float
    rtn_error: float
    damping: float
    fallback: str = ""


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """tr(E H Eᵀ) of E [N, K]: the mean squared change of the layer's outputs, summed over rows."""
    return float(torch.sum((difference @ hessian) * difference, dtype=torch.float64))


def inverse_factor(hessian: Tensor, damp_percent: float) -> tuple[Tensor | None, float]:
    """Upper triangular U with H⁻¹ = Uᵀ U for the damped H, and the damping used; None if no damping helped.

    With J the reversal, J H J = L Lᵀ gives H = R Rᵀ for the upper triangular R = J L J, hence U = R⁻¹:
    one factorisation and one triangular inverse instead of two factorisations and a full inverse.
    """
    diagonal = torch.diagonal(hessian)
    mean = diagonal.mean()
    damping = damp_percent
    for _ in range(DAMPING_STEPS):
        damped = hessian.flip(0, 1).clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed and bool(torch.isfinite(factor).all()):
            identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
            return inverse.flip(0, 1).contiguous(), damping
        damping *= 10
    return None, damping


def _compensate(w: Tensor, factor: Tensor, grid: AffineGrid, columns: Scales) -> Tensor:
    """Codes uint8 [K, N] of weights w [K, N] (overwritten), column scales [K, N], factor U [K, K]."""
    k = w.shape[0]
    codes = torch.empty_like(w, dtype=torch.uint8)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        block = w[start:stop]
        local = factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        pivots = torch.diagonal(local).tolist()
        for i in range(stop - start):
            scale, offset = columns.scale[start + i], columns.offset[start + i]
            column = block[i]
            code = grid.round(column, scale, offset)
            codes[start + i] = code
            error = (column - grid.value(code, scale, offset)) / pivots[i]
            errors[i] = error
            block[i + 1 :].addr_(local[i, i + 1 :], error, alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes


def solve(
    weights: list[Tensor],
    hessian: Tensor,
    grid: AffineGrid,
    *,
    damp_percent: float = 0.01,
    desc_act: bool = False,
) -> list[Solution]:
    """Quantize weights [N_i, K] that share an input with second moments `hessian` [K, K].

    They are stacked along N, which changes nothing in the result (rows are independent) and saves passes. With
    `desc_act` groups are formed along the act-order and each tensor carries its `group_index`.
    """
    w = torch.cat(weights)  # [N, K]
    diagonal = torch.diagonal(hessian)
    # Damped as the solve is: an input that calibration never saw may still come alive later.
    importance = diagonal + max(damp_percent * float(diagonal.mean()), 1e-12)
    order = torch.argsort(importance, descending=True, stable=True)
    factor, damping = inverse_factor(hessian[order][:, order], damp_percent)

    group_index = None
    if desc_act:
        group_index = torch.empty_like(order)
        group_index[order] = torch.arange(len(order), device=order.device) // grid.columns_per_group(
            len(order)
        )
        scales = grid.fit(w[:, order], importance[order])
    else:
        scales = grid.fit(w, importance)
    columns = grid.spread(scales, w.shape[1], group_index)
    if factor is None:
        codes = grid.encode(w, columns)
    else:
        turned = Scales(columns.scale.T[order].contiguous(), columns.offset.T[order].contiguous())
        found = _compensate(w.T[order].contiguous(), factor, grid, turned)
        codes = torch.empty_like(found)
        codes[order] = found
        codes = codes.T.contiguous()

    plain = grid.plain_rounding(w).decode()
    decoded = grid.decode(codes, columns)
    solutions, start = [], 0
    for weight in weights:
        rows = slice(start, start + len(weight))
        start += len(weight)
        size = max(output_error(weight, hessian), 1e-30)
        tensor = QuantizedTensor(
            grid, codes[rows], Scales(scales.scale[rows], scales.offset[rows]), group_index
        )
        solutions.append(
            Solution(
                tensor,
                output_error(weight - decoded[rows], hessian) / size,
                output_error(weight - plain[rows], hessian) / size,
                damping,
                "" if factor is not None else "hessian not positive definite: importance-weighted rounding",
            )
        )
    return solutions
