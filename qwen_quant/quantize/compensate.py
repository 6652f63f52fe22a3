"""Rounding columns one after the other, each one's error spread into those that are still to come.

Columns are solved from the last to the first, as `Factor` wants them. Shapes: E problems, N rows, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_quant import _core
from qwen_quant.grids.base import AffineGrid, Scales
from qwen_quant.quantize.factor import Factor

BLOCK = 128  # columns that the errors of all columns before them are spread into at once
FEW = 32  # columns among which errors are spread one by one


class Columns:
    """Scales by column, columns first: a few at a time, since all of them are as large as the weights."""

    def __init__(self, scales: Scales, groups: Tensor) -> None:
        self._scale, self._offset = scales.scale.mT.contiguous(), scales.offset.mT.contiguous()  # [E, G, N]
        self._groups = groups

    def __getitem__(self, columns: slice) -> Scales:
        """The scales of some columns, each [E, M, N]."""
        index = self._groups[:, columns]
        return Scales(select(self._scale, index), select(self._offset, index))


def select(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [E, A, B] by index [E, M], each problem by its own: [E, M, B]."""
    if len(x) == 1:
        return x[0].index_select(0, index[0])[None]
    return torch.stack([part.index_select(0, mine) for part, mine in zip(x, index, strict=True)])


def _blocks(k: int) -> list[slice]:
    """All columns in blocks, from the last to the first."""
    return [slice(max(0, stop - BLOCK), stop) for stop in range(k, 0, -BLOCK)]


def compensate(w: Tensor, factor: Factor, grid: AffineGrid, columns: Columns) -> Tensor:
    """Codes uint8 [E, K, N] of weights w [E, K, N].

    Errors are spread into a block from all columns before it, then within the block from a few columns at a time
    into the others, and among these few from column to column.
    """
    codes = torch.empty_like(w, dtype=torch.uint8)
    error = torch.empty_like(w)  # W - Q
    for block in _blocks(w.shape[1]):
        target = w[:, block].clone()  # what each column would best be decoded to
        target.baddbmm_(factor.spread[:, block.stop :, block].mT, error[:, block.stop :])
        scales = columns[block]
        for stop in range(target.shape[1], 0, -FEW):
            some = slice(max(0, stop - FEW), stop)
            here = slice(block.start + some.start, block.start + some.stop)
            spread = factor.spread[:, here, block]
            _round_columns(
                target[:, some],
                Scales(scales.scale[:, some], scales.offset[:, some]),
                grid,
                spread[:, :, some],
                w[:, here],
                codes[:, here],
                error[:, here],
            )
            target[:, : some.start].baddbmm_(spread[:, :, : some.start].mT, error[:, here])
    return codes


def _round_columns(
    target: Tensor, scales: Scales, grid: AffineGrid, spread: Tensor, w: Tensor, codes: Tensor, error: Tensor
) -> None:
    """Round the targets of a few columns [E, M, N], the last one first, each one's error spread into those before it.

    Writes `codes` and the `error` against the weights `w`. On a CPU that is one compiled loop.
    """
    if target.device.type != "cpu":
        _round_one_by_one(target, scales, grid, spread, w, codes, error)
        return
    tensors = (target, scales.scale, scales.offset, spread, w, codes, error)
    _core.round_columns(grid.compiled, *(x.numpy() for x in tensors))


def _round_one_by_one(
    target: Tensor, scales: Scales, grid: AffineGrid, spread: Tensor, w: Tensor, codes: Tensor, error: Tensor
) -> None:
    """`_round_columns` on any device."""
    for i in range(target.shape[1] - 1, -1, -1):
        scale, offset = scales.scale[:, i], scales.offset[:, i]  # [E, N]
        code = grid.round(target[:, i], scale, offset)
        value = grid.value(code, scale, offset)
        codes[:, i] = code
        torch.sub(w[:, i], value, out=error[:, i])
        if i:
            target[:, :i].addcmul_(spread[:, i, :i, None], error[:, i, None])


def rounding_error(w: Tensor, grid: AffineGrid, columns: Columns) -> Tensor:
    """What w [E, K, N] loses by rounding to nearest, [E, K, N]."""
    error = torch.empty_like(w)
    for block in _blocks(w.shape[1]):
        scales = columns[block]
        code = grid.round(w[:, block], scales.scale, scales.offset)
        torch.sub(w[:, block], grid.value(code, scales.scale, scales.offset), out=error[:, block])
    return error
