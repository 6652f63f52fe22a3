"""Coordinate descent over codes and scales, from where GPTQ ended (after QuantEase, Behdin et al. 2023,
arXiv:2309.01885, which descends over codes).

GPTQ fixes a group's scales before it knows what its columns will have to make up for, and never returns to a column.
Here each column gets the code that is best beside all others as they are by then, and each group the scales that are
best for its codes under the whole Hessian. No step raises tr((W - Q) H (W - Q)ᵀ).

For all steps a group needs the pull H (W - Q) on its columns: what each would gain by moving. Groups whose scales are
stored together (a super-block) take their steps together, on a pull that is computed as they begin.
Shapes: E problems, N rows, K columns, of which M make a block of G groups of S.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_quant import _core
from qwen_quant.grids.base import AffineGrid, Scales, Sums

SWEEPS = 1  # over all blocks; a second one lowers the loss further, but not the divergence on other text
STEPS = 2  # of scales and codes in turn, in each block
WIDEST = 256  # columns of a block


@dataclass
class Descent:
    """A stack of weights w [E, K, N] on `grid` with groups in order: codes uint8 [E, K, N], scale and offset
    [E, G, N], all changed in place, and what the codes miss, `error` = W - Q [E, K, N]."""

    grid: AffineGrid
    hessian: Tensor  # [E, K, K]
    damping: Tensor  # [E]: added to its diagonal
    codes: Tensor
    scale: Tensor
    offset: Tensor
    error: Tensor

    @classmethod
    def begin(
        cls, grid: AffineGrid, w: Tensor, codes: Tensor, scales: Scales, hessian: Tensor, damping: Tensor
    ) -> Descent:
        """From codes of w [E, K, N] and scales [E, N, G]."""
        scale, offset = scales.scale.mT.contiguous(), scales.offset.mT.contiguous()
        descent = cls(grid, hessian, damping, codes.contiguous(), scale, offset, torch.empty_like(w))
        for block in descent._blocks():
            torch.sub(w[:, block], descent._values(block), out=descent.error[:, block])
        return descent

    @property
    def scales(self) -> Scales:
        """As they are now, [E, N, G]."""
        return Scales(self.scale.mT, self.offset.mT)

    def run(self, failed: Sequence[str]) -> None:
        """Descend in all problems but the `failed` ones, whose Hessian measures nothing."""
        if any(failed):
            sound = [e for e, bad in enumerate(failed) if not bad]
            if not sound:
                return
            part = Descent(self.grid, *(x[sound] for x in (self.hessian, self.damping, *self._state)))
            part.run([])
            for mine, found in zip(self._state, part._state, strict=True):
                mine[sound] = found
            return
        for _ in range(SWEEPS):
            for block in self._blocks():
                self._descend(block)

    @property
    def _state(self) -> tuple[Tensor, ...]:
        """What changes."""
        return self.codes, self.scale, self.offset, self.error

    def _blocks(self) -> Iterator[slice]:
        k = self.codes.shape[1]
        width = min(self._size * self.grid.groups_per_block, WIDEST)
        yield from (slice(start, min(k, start + width)) for start in range(0, k, width))

    @property
    def _size(self) -> int:
        return self.grid.columns_per_group(self.codes.shape[1])

    def _descend(self, block: slice) -> None:
        """Improve the scales and codes of one block."""
        here = self.hessian[:, block, block].clone()  # [E, M, M]
        torch.diagonal(here, dim1=1, dim2=2).add_(self.damping[:, None])
        pull = self.hessian[:, block] @ self.error
        pull.add_(self.error[:, block] * self.damping[:, None, None])
        for _ in range(STEPS):
            if self._whole_groups(block):
                self._refit(block, here, pull)
            columns = self._columns(block)
            codes, error = self.codes[:, block], self.error[:, block]
            if pull.device.type == "cpu":
                tensors = (here, columns.scale, columns.offset, pull, codes, error)
                _core.descend_columns(self.grid.compiled, *(x.numpy() for x in tensors))
            else:
                _one_by_one(self.grid, here, columns, pull, codes, error)

    def _whole_groups(self, block: slice) -> bool:
        """Whether the scales of a block serve it alone, and no group is short."""
        return (block.stop - block.start) == self._size * self.grid.groups_per_block

    def _groups(self, block: slice) -> slice:
        return slice(block.start // self._size, -(-block.stop // self._size))

    def _columns(self, block: slice) -> Scales:
        """The scales of each column of a block, [E, M, N]."""
        groups = self._groups(block)
        return self._spread(Scales(self.scale[:, groups], self.offset[:, groups]), block)

    def _spread(self, scales: Scales, block: slice) -> Scales:
        """Those of the groups of a block [E, G, N] for each of its columns, [E, M, N]."""
        if scales.scale.shape[1] == 1:  # nothing to copy
            shape = (-1, block.stop - block.start, -1)
            return Scales(scales.scale.expand(shape), scales.offset.expand(shape))
        columns = torch.arange(block.start, block.stop, device=self.scale.device)
        index = columns // self._size - block.start // self._size
        return Scales(scales.scale.index_select(1, index), scales.offset.index_select(1, index))

    def _values(self, block: slice) -> Tensor:
        columns = self._columns(block)
        return self.grid.value(self.codes[:, block].float(), columns.scale, columns.offset)

    def _refit(self, block: slice, here: Tensor, pull: Tensor) -> None:
        """Give a block the scales that are best for its codes, each row for which they lower the loss."""
        columns, groups = self._columns(block), self._groups(block)
        codes = self.codes[:, block].float()
        values = self.grid.value(codes, columns.scale, columns.offset)  # [E, M, N]
        old = Scales(self.scale[:, groups], self.offset[:, groups])
        found = self.grid.refit(self._sums(codes, columns, values, here, pull), _by_row(old))
        new = _by_column(found, old)
        columns = self._spread(new, block)
        moved = values.sub_(self.grid.value(codes, columns.scale, columns.offset))
        pulled = here @ moved
        change = moved * torch.add(pulled, pull, alpha=2)
        loss = change.sum(1, keepdim=True)  # [E, 1, N]: by how much it rises
        better = loss < 0
        self.scale[:, groups] = torch.where(better, new.scale, old.scale)
        self.offset[:, groups] = torch.where(better, new.offset, old.offset)
        self.error[:, block] += moved.mul_(better)
        pull += pulled.mul_(better)

    def _sums(self, codes: Tensor, columns: Scales, values: Tensor, here: Tensor, pull: Tensor) -> Sums:
        """The loss of each group as a quadratic form of its scale and offset, the others as they are [E * N * G, 1].

        That is the weighted squared error that `AffineGrid.refit` expects, only that the weights of a group are a
        matrix: its block of H. The weights that it would best decode to are never needed without that matrix.
        """
        e, m, n = codes.shape
        size = self._size
        shape = (e, m // size, size, n)
        own = torch.stack(
            [here[:, start : start + size, start : start + size] for start in range(0, m, size)], 1
        )
        level = self.grid.level(codes, columns.offset).view(shape)
        weighted = own @ level  # [E, G, S, N]
        target = own @ values.view(shape) + pull.view(shape)
        sums = (
            own.sum((2, 3))[..., None].expand(e, m // size, n),
            target.sum(2),
            weighted.sum(2),
            (level * weighted).sum(2),
            (level * target).sum(2),
        )
        return Sums(*(_flat(x) for x in sums))


def _flat(x: Tensor) -> Tensor:
    """[E, G, N] as [E * N * G, 1]."""
    return x.mT.reshape(-1, 1)


def _by_row(scales: Scales) -> Scales:
    return Scales(_flat(scales.scale), _flat(scales.offset))


def _by_column(scales: Scales, like: Scales) -> Scales:
    """The inverse of `_by_row`."""
    e, g, n = like.scale.shape
    return Scales(scales.scale.view(e, n, g).mT, scales.offset.view(e, n, g).mT)


def _one_by_one(
    grid: AffineGrid, here: Tensor, columns: Scales, pull: Tensor, codes: Tensor, error: Tensor
) -> None:
    """The compiled loop on any device."""
    for i in range(codes.shape[1] - 1, -1, -1):
        scale, offset = columns.scale[:, i], columns.offset[:, i]  # [E, N]
        value = grid.value(codes[:, i].float(), scale, offset)
        code = grid.round(value + pull[:, i] / here[:, i, i, None], scale, offset)
        moved = value - grid.value(code, scale, offset)
        codes[:, i] = code
        error[:, i] += moved
        pull += here[:, :, i, None] * moved[:, None]
