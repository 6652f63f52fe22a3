"""The GPTQ solver (Frantar et al. 2022, arXiv:2210.17323) over any affine grid.

Minimises tr((W - Q) H (W - Q)ᵀ) column by column: each column is rounded after the errors of those before it were
spread into it. Columns go in order of falling diag(H) ("act-order"); unless `desc_act` is set the groups stay in
their stored order, so that no reader needs an index for it.

Errors are spread by the Cholesky factor of H itself (factor.py), in the form of Babai's nearest plane: it makes the
same choices as the factor of H⁻¹ in the first paper (Chen et al. 2025, arXiv:2507.18553), needs no inverse, and the
loss of the solve is known when it ends.

Everything is done for a stack of problems at once (the experts of a layer); a dense layer is a stack of one.
Shapes: E problems, N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_quant import _core
from qwen_quant.grids.base import AffineGrid, QuantizedTensor, Scales
from qwen_quant.quantize.factor import Factor, factorise, output_error, spread_cost
from qwen_quant.quantize.parallel import each_on_its_thread

BLOCK = 128  # columns that the errors of all columns before them are spread into at once
FEW = 32  # columns among which errors are spread one by one
FLOATS_AT_ONCE = 1 << 24  # weights of the rows that are solved together: bounds the temporaries
FALLBACK = "hessian not positive definite: importance-weighted rounding"


@dataclass
class Solution:
    """A solved weight and how far it is off: relative output errors tr(D H Dᵀ) / tr(W H Wᵀ) of D = W - Q."""

    tensor: QuantizedTensor
    error: float
    rtn_error: float
    damping: float
    fallback: str = ""


@dataclass
class _Rows:
    """What is found for some rows: codes uint8 [E, N, K], scales [E, N, G], and diag(D H Dᵀ) [E, N] of the solve's
    error D, of plain rounding's, and of W itself."""

    codes: Tensor
    scales: Scales
    cost: Tensor
    rtn_cost: Tensor
    size: Tensor


@dataclass
class _Problem:
    """What the rows of a stack share. Columns are solved from the last to the first, hence `order` ascends."""

    grid: AffineGrid
    importance: Tensor  # [E, K], in stored order
    order: Tensor  # [E, K]: the stored column at each place
    factor: Factor
    desc_act: bool

    @property
    def stored_groups(self) -> Tensor:
        """The group of the column at each place [E, K], groups in stored order."""
        return self.order // self.grid.columns_per_group(self.order.shape[1])

    @property
    def groups(self) -> Tensor:
        """The group of the column at each place [E, K]."""
        if not self.desc_act:
            return self.stored_groups
        k = self.order.shape[1]
        place = torch.arange(k - 1, -1, -1, device=self.order.device)
        return (place // self.grid.columns_per_group(k)).expand_as(self.order)

    def group_index(self) -> Tensor | None:
        """The group of each stored column [E, K], where it is not in order."""
        return self.groups.gather(1, self.order.argsort(-1)) if self.desc_act else None

    def solve(self, weights: Tensor) -> _Rows:
        """Quantize rows [E, N, K]."""
        w = _select(weights.mT, self.order)  # [E, K, N]
        if self.desc_act:
            scales = self._fit(w.flip(1).mT, self.importance.gather(1, self.order.flip(1)))
        else:
            scales = self._fit(weights, self.importance)
        found, cost = _compensate(w, self.factor, self.grid, _Columns(scales, self.groups))
        plain = _Columns(self._fit(weights), self.stored_groups)
        return _Rows(
            codes=_select(found, self.order.argsort(-1)).mT.contiguous(),
            scales=scales,
            cost=cost,
            rtn_cost=output_error(_rounding_error(w, self.grid, plain), self.factor),
            size=output_error(w, self.factor),
        )

    def _fit(self, weights: Tensor, importance: Tensor | None = None) -> Scales:
        """Scales [E, N, G] for weights [E, N, K] and importance [E, K]."""
        found = [
            self.grid.fit(rows, None if importance is None else importance[e])
            for e, rows in enumerate(weights)
        ]
        return Scales(torch.stack([s.scale for s in found]), torch.stack([s.offset for s in found]))


class _Columns:
    """Scales by column, columns first: a few at a time, since all of them are as large as the weights."""

    def __init__(self, scales: Scales, groups: Tensor) -> None:
        self._scale, self._offset = scales.scale.mT.contiguous(), scales.offset.mT.contiguous()  # [E, G, N]
        self._groups = groups

    def __getitem__(self, columns: slice) -> Scales:
        """The scales of some columns, each [E, M, N]."""
        index = self._groups[:, columns]
        return Scales(_select(self._scale, index), _select(self._offset, index))


def _select(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [E, A, B] by index [E, M], each problem by its own: [E, M, B]."""
    if len(x) == 1:
        return x[0].index_select(0, index[0])[None]
    return torch.stack([part.index_select(0, mine) for part, mine in zip(x, index, strict=True)])


def _blocks(k: int) -> list[slice]:
    """All columns in blocks, from the last to the first."""
    return [slice(max(0, stop - BLOCK), stop) for stop in range(k, 0, -BLOCK)]


def _compensate(w: Tensor, factor: Factor, grid: AffineGrid, columns: _Columns) -> tuple[Tensor, Tensor]:
    """Codes uint8 [E, K, N] of weights w [E, K, N], and what rounding to them costs: diag(D H Dᵀ) [E, N].

    Errors are spread into a block from all columns before it, then within the block from a few columns at a time
    into the others, and among these few from column to column.
    """
    e, k, n = w.shape
    codes = torch.empty_like(w, dtype=torch.uint8)
    error = torch.empty_like(w)  # W - Q
    cost = torch.zeros(e, n, dtype=torch.float64, device=w.device)
    for block in _blocks(k):
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
        cost += spread_cost(target, factor, block)
    return codes, factor.undamped(cost, error)


def _round_columns(
    target: Tensor, scales: Scales, grid: AffineGrid, spread: Tensor, w: Tensor, codes: Tensor, error: Tensor
) -> None:
    """Round the targets of a few columns [E, M, N], the last one first, each one's error spread into those before it.

    Writes `codes` and the `error` against the weights `w`; leaves in `target` what each missed its target by. On a
    CPU that is one compiled loop.
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
        target[:, i] -= value
        torch.sub(w[:, i], value, out=error[:, i])
        if i:
            target[:, :i].addcmul_(spread[:, i, :i, None], error[:, i, None])


def _rounding_error(w: Tensor, grid: AffineGrid, columns: _Columns) -> Tensor:
    """What w [E, K, N] loses by rounding to nearest, [E, K, N]."""
    error = torch.empty_like(w)
    for block in _blocks(w.shape[1]):
        scales = columns[block]
        code = grid.round(w[:, block], scales.scale, scales.offset)
        torch.sub(w[:, block], grid.value(code, scales.scale, scales.offset), out=error[:, block])
    return error


def solve(
    weights: list[Tensor],
    hessian: Tensor,
    grids: AffineGrid | Sequence[AffineGrid],
    *,
    damp_percent: float = 0.01,
    desc_act: bool = False,
) -> list[Solution]:
    """Quantize weights [N_i, K] that share an input with second moments `hessian` [K, K].

    `grids` is one for all or one for each.
    """
    stacks = [weight[None] for weight in weights]
    return solve_stack(stacks, hessian[None], grids, damp_percent=damp_percent, desc_act=desc_act)[0]


def solve_stack(
    weights: list[Tensor],
    hessian: Tensor,
    grids: AffineGrid | Sequence[AffineGrid],
    *,
    damp_percent: float = 0.01,
    desc_act: bool = False,
) -> list[list[Solution]]:
    """Quantize E times the weights [E, N_i, K] that share an input with second moments `hessian` [E, K, K].

    On a CPU each thread takes a part of the stack. With `desc_act` groups are formed along the act-order and each
    tensor carries its `group_index`. Returns for each of the E problems a solution of each weight.
    """
    each = [grids] * len(weights) if isinstance(grids, AffineGrid) else list(grids)

    def solve_part(part: slice) -> list[list[Solution]]:
        return _solve_stack([w[part] for w in weights], hessian[part], each, damp_percent, desc_act)

    e = len(hessian)
    step = -(-e // torch.get_num_threads()) if hessian.device.type == "cpu" else e
    parts = [slice(start, start + step) for start in range(0, e, step)]
    return [solution for found in each_on_its_thread(solve_part, parts) for solution in found]


def _solve_stack(
    weights: list[Tensor], hessian: Tensor, grids: list[AffineGrid], damp_percent: float, desc_act: bool
) -> list[list[Solution]]:
    """`solve_stack` on this thread: the Hessian is factored once, whatever the grids."""
    diagonal = torch.diagonal(hessian, dim1=1, dim2=2)
    # Damped as the solve is: an input that calibration never saw may still come alive later.
    importance = diagonal + (damp_percent * diagonal.mean(-1, keepdim=True)).clamp(min=1e-12)  # [E, K]
    order = torch.argsort(importance, dim=-1, descending=True, stable=True).flip(-1)  # [E, K]
    factor = factorise(_select(_select(hessian, order).mT, order), damp_percent)
    members: dict[str, list[int]] = {}
    for index, grid in enumerate(grids):
        members.setdefault(grid.name, []).append(index)
    solved: dict[int, list[Solution]] = {}
    for indices in members.values():
        problem = _Problem(grids[indices[0]], importance, order, factor, desc_act)
        found = _solve_together(problem, [weights[index] for index in indices])
        solved |= dict(zip(indices, found, strict=True))
    return [[solved[index][e] for index in range(len(weights))] for e in range(len(hessian))]


def _solve_together(problem: _Problem, weights: list[Tensor]) -> list[list[Solution]]:
    """Solutions of each weight [E, N_i, K] on the problem's grid, E of them.

    The weights are put together along N, which changes nothing in the result (rows are independent) and saves passes.
    """
    w = weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)  # [E, N, K]
    found = _joined(each_on_its_thread(problem.solve, w.split(_rows_at_once(w), dim=1)))
    index, factor = problem.group_index(), problem.factor
    solutions: list[list[Solution]] = []
    start = 0
    for weight in weights:
        rows = slice(start, start + weight.shape[1])
        start = rows.stop
        size = found.size[:, rows].sum(-1).clamp(min=1e-30)
        errors = (found.cost[:, rows].sum(-1) / size).tolist()
        rtn_errors = (found.rtn_cost[:, rows].sum(-1) / size).tolist()
        solutions.append([])
        for e in range(len(w)):
            scales = Scales(found.scales.scale[e, rows], found.scales.offset[e, rows])
            group_index = None if index is None else index[e]
            tensor = QuantizedTensor(problem.grid, found.codes[e, rows], scales, group_index)
            fallback = FALLBACK if factor.failed[e] else ""
            solutions[-1].append(Solution(tensor, errors[e], rtn_errors[e], factor.dampings[e], fallback))
    return solutions


def _rows_at_once(w: Tensor) -> int:
    """Rows are independent: each thread takes some at a time."""
    threads = torch.get_num_threads() if w.device.type == "cpu" else 1
    bound = FLOATS_AT_ONCE // (threads * w.shape[0] * w.shape[2])
    return max(1, min(bound, -(-w.shape[1] // threads)))


def _joined(parts: list[_Rows]) -> _Rows:
    """The same for all rows."""

    def join(of: Callable[[_Rows], Tensor]) -> Tensor:
        return torch.cat([of(part) for part in parts], dim=1)

    scales = Scales(join(lambda part: part.scales.scale), join(lambda part: part.scales.offset))
    costs = (join(lambda part: part.cost), join(lambda part: part.rtn_cost), join(lambda part: part.size))
    return _Rows(join(lambda part: part.codes), scales, *costs)
