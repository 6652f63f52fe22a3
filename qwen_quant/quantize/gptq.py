"""The GPTQ solver (Frantar et al. 2022, arXiv:2210.17323) over any affine grid.

Minimises tr((W - Q) H (W - Q)ᵀ) column by column: each column is rounded and its error is spread over the
columns not yet rounded, by the Cholesky factor of H⁻¹. Columns go in order of falling diag(H) ("act-order");
unless `desc_act` is set the groups stay in their stored order, so that no reader needs an index for it.

Everything is done for a stack of problems at once (the experts of a layer); a dense layer is a stack of one.
Shapes: E problems, N rows, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_quant.grids.base import AffineGrid, QuantizedTensor, Scales

BLOCK = 128  # columns whose errors are spread at once into the rest
# Weights that one column's error is spread into at once: they stay in the second-level cache.
CACHED = 1 << 18
DAMPING_STEPS = 4  # each ten times the one before, when the factorisation fails
FALLBACK = "hessian not positive definite: importance-weighted rounding"


@dataclass
class Solution:
    """A solved weight and how far it is off: relative output errors tr(E H Eᵀ) / tr(W H Wᵀ)."""

    tensor: QuantizedTensor
    error: float
    rtn_error: float
    damping: float
    fallback: str = ""


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """tr(D H Dᵀ) [E] of D [E, N, K]: the mean squared change of the layers' outputs, summed over rows."""
    return torch.sum((difference @ hessian) * difference, dim=(1, 2), dtype=torch.float64)


def inverse_factor(hessian: Tensor, damp_percent: float) -> tuple[Tensor, list[float], list[bool]]:
    """Upper triangular U [E, K, K] with H⁻¹ = Uᵀ U for the damped H [E, K, K], the dampings used, and which failed.

    With J the reversal, J H J = L Lᵀ gives H = R Rᵀ for the upper triangular R = J L J, hence U = R⁻¹:
    one factorisation and one triangular inverse instead of two factorisations and a full inverse. Where no
    damping helped U is the identity, which spreads no errors.
    """
    factor = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device).repeat(
        len(hessian), 1, 1
    )
    means = torch.diagonal(hessian, dim1=1, dim2=2).mean(-1)
    dampings, open_ = [0.0] * len(hessian), list(range(len(hessian)))
    damping = damp_percent
    for _ in range(DAMPING_STEPS):
        damped = hessian[open_].flip(1, 2)
        damped.diagonal(dim1=1, dim2=2).add_(damping * means[open_, None])
        lower, failed = torch.linalg.cholesky_ex(damped)
        good = ((failed == 0) & torch.isfinite(lower).all(-1).all(-1)).tolist()
        solved = [index for index, fine in zip(open_, good, strict=True) if fine]
        if solved:
            identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
            inverse = torch.linalg.solve_triangular(lower[good], identity, upper=False)
            factor[solved] = inverse.flip(1, 2)
        for index in open_:
            dampings[index] = damping
        open_ = [index for index, fine in zip(open_, good, strict=True) if not fine]
        if not open_:
            break
        damping *= 10
    return factor, dampings, [index in open_ for index in range(len(hessian))]


def _compensate(w: Tensor, factor: Tensor, grid: AffineGrid, columns: Scales) -> Tensor:
    """Codes uint8 [E, K, N] of weights w [E, K, N] (overwritten), column scales [E, K, N], factor U [E, K, K].

    Errors are spread column by column within a few columns, then at once within a block, then into the rest.
    """
    e, k, n = w.shape
    codes = torch.empty_like(w, dtype=torch.uint8)
    few = min(BLOCK, max(8, CACHED // (e * n)))
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        errors = torch.empty_like(w[:, start:stop])
        for first in range(start, stop, few):
            last = min(first + few, stop)
            found = errors[:, first - start : last - start]
            _round_columns(w, factor, grid, columns, codes, found, first, last)
            if last < stop:
                w[:, last:stop].baddbmm_(factor[:, first:last, last:stop].mT, found, alpha=-1)
        w[:, stop:].baddbmm_(factor[:, start:stop, stop:].mT, errors, alpha=-1)
    return codes


def _round_columns(
    w: Tensor,
    factor: Tensor,
    grid: AffineGrid,
    columns: Scales,
    codes: Tensor,
    errors: Tensor,
    first: int,
    last: int,
) -> None:
    """Round columns first … last of w [E, K, N], spreading each one's error into those after it."""
    block, local = w[:, first:last], factor[:, first:last, first:last]
    pivots = torch.diagonal(local, dim1=1, dim2=2)
    for i in range(last - first):
        scale, offset = columns.scale[:, first + i], columns.offset[:, first + i]  # [E, N]
        column = block[:, i]
        code = grid.round(column, scale, offset)
        codes[:, first + i] = code
        error = (column - grid.value(code, scale, offset)) / pivots[:, i, None]
        errors[:, i] = error
        if i + 1 < last - first:
            block[:, i + 1 :].addcmul_(local[:, i, i + 1 :, None], error[:, None], value=-1)


def solve(
    weights: list[Tensor],
    hessian: Tensor,
    grid: AffineGrid,
    *,
    damp_percent: float = 0.01,
    desc_act: bool = False,
) -> list[Solution]:
    """Quantize weights [N_i, K] that share an input with second moments `hessian` [K, K]."""
    stacks = [weight[None] for weight in weights]
    return solve_stack(stacks, hessian[None], grid, damp_percent=damp_percent, desc_act=desc_act)[0]


def solve_stack(
    weights: list[Tensor],
    hessian: Tensor,
    grid: AffineGrid,
    *,
    damp_percent: float = 0.01,
    desc_act: bool = False,
) -> list[list[Solution]]:
    """Quantize E times the weights [E, N_i, K] that share an input with second moments `hessian` [E, K, K].

    Weights that share an input are put together along N, which changes nothing in the result (rows are
    independent) and saves passes. With `desc_act` groups are formed along the act-order and each tensor carries
    its `group_index`. Returns for each of the E problems a solution of each weight.
    """
    w = torch.cat(weights, dim=1)  # [E, N, K]
    diagonal = torch.diagonal(hessian, dim1=1, dim2=2)
    # Damped as the solve is: an input that calibration never saw may still come alive later.
    importance = diagonal + (damp_percent * diagonal.mean(-1, keepdim=True)).clamp(min=1e-12)  # [E, K]
    order = torch.argsort(importance, dim=-1, descending=True, stable=True)  # [E, K]
    factor, dampings, failed = inverse_factor(_reorder(_reorder(hessian, order, 2), order, 1), damp_percent)

    k = w.shape[-1]
    groups = torch.arange(k, device=order.device).expand_as(order) // grid.columns_per_group(k)
    if desc_act:
        groups = torch.empty_like(order).scatter_(1, order, groups)
        scales = _fit(grid, _reorder(w, order, 2), importance.gather(1, order))
    else:
        scales = _fit(grid, w, importance)
    columns = Scales(_reorder(scales.scale, groups, 2), _reorder(scales.offset, groups, 2))  # [E, N, K]
    turned = Scales(*(_reorder(x.mT, order, 1) for x in (columns.scale, columns.offset)))
    found = _compensate(_reorder(w.mT, order, 1), factor, grid, turned)
    codes = torch.empty_like(found).scatter_(1, order[:, :, None].expand_as(found), found).mT

    error = w - grid.decode(codes, columns)
    plain = w - grid.plain_rounding(w.flatten(0, 1)).decode().view_as(w)
    solutions: list[list[Solution]] = [[] for _ in w]
    start = 0
    for weight in weights:
        rows = slice(start, start + weight.shape[1])
        start += weight.shape[1]
        size = output_error(weight, hessian).clamp(min=1e-30)
        errors = (output_error(error[:, rows], hessian) / size).tolist()
        rtn_errors = (output_error(plain[:, rows], hessian) / size).tolist()
        for e, solved in enumerate(solutions):
            parts = Scales(scales.scale[e, rows], scales.offset[e, rows])
            index = groups[e] if desc_act else None
            tensor = QuantizedTensor(grid, codes[e, rows].contiguous(), parts, index)
            solved.append(
                Solution(tensor, errors[e], rtn_errors[e], dampings[e], FALLBACK if failed[e] else "")
            )
    return solutions


def _reorder(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """x [E, ., .] with dimension `dim` (1 or 2) indexed by index [E, M], each problem by its own row; contiguous."""
    return torch.stack([part.index_select(dim - 1, mine) for part, mine in zip(x, index, strict=True)])


def _fit(grid: AffineGrid, w: Tensor, importance: Tensor) -> Scales:
    """Scales [E, N, G] for weights [E, N, K] and importance [E, K]."""
    e, n, k = w.shape
    rows = importance[:, None].expand(e, n, k)
    scales = grid.fit(w.reshape(e * n, k), rows.reshape(e * n, k))
    return Scales(scales.scale.view(e, n, -1), scales.offset.view(e, n, -1))
