"""The GPTQ solver (Frantar et al. 2022, arXiv:2210.17323) over any affine grid.

Minimises tr((W - Q) H (W - Q)ᵀ) column by column: each column is rounded after the errors of those before it were
spread into it. Columns go in order of falling diag(H) ("act-order"); unless `desc_act` is set the groups stay in
their stored order, so that no reader needs an index for it.

Then codes and scales descend further together (descend.py). Rows are independent, unless the moments of the gradients
by their outputs are given (chains.py).

Errors are spread by the Cholesky factor of H itself (factor.py), in the form of Babai's nearest plane: it makes the
same choices as the factor of H⁻¹ in the first paper (Chen et al. 2025, arXiv:2507.18553) and needs no inverse.

Everything is done for a stack of problems at once (the experts of a layer); a dense layer is a stack of one.
Shapes: E problems, N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qwen_quant.grids.base import AffineGrid, QuantizedTensor, Scales
from qwen_quant.quantize.chains import in_chain
from qwen_quant.quantize.compensate import Columns, compensate, rounding_error, select
from qwen_quant.quantize.descend import Descent
from qwen_quant.quantize.factor import Factor, factorise, output_error
from qwen_quant.quantize.parallel import Item, OnEach, Result, each_on_its_thread
from qwen_quant.quantize.ranks import each_on_its_rank, shares
from qwen_quant.quantize.rows import Rounded, Rows

FLOATS_AT_ONCE = 1 << 24  # weights of the rows that are solved together: bounds the temporaries
ROWS_AT_ONCE = 512  # of them on a CPU, so that there are pieces for all threads and ranks
LARGE = 512  # rows: of weights with fewer all errors are measured, of others
MEASURED = 8  # one row in so many
FALLBACK = "importance-weighted rounding"


@dataclass
class Solution:
    """A solved weight W [N, K] and how far it is off: for each row diag(D H Dᵀ) of D = W - Q, of what plain rounding
    would miss, and of W itself, float64 [N]; all three are 0 for a row that was not measured."""

    tensor: QuantizedTensor
    cost: Tensor
    rtn_cost: Tensor
    size: Tensor
    damping: float
    more_damping: bool = False  # than was asked for
    fallback: str = ""

    @property
    def error(self) -> float:
        """The relative output error tr(D H Dᵀ) / tr(W H Wᵀ)."""
        return float(self.cost.sum() / self.size.sum().clamp(min=1e-30))

    @property
    def rtn_error(self) -> float:
        """The same of plain rounding."""
        return float(self.rtn_cost.sum() / self.size.sum().clamp(min=1e-30))


@dataclass
class Input:
    """What all weights that read an input share. Columns are solved from the last to the first, hence `order`
    ascends."""

    hessian: Tensor  # [E, K, K], in stored order
    # [E, K], in stored order: what is left of each input's second moment when those that are solved after it have made
    # up for it. A rounding error that they answer costs no more than this.
    importance: Tensor
    order: Tensor  # [E, K]: the stored column at each place
    factor: Factor

    @classmethod
    def of(cls, hessian: Tensor, damp_percent: float) -> Input:
        """Factor second moments [E, K, K]."""
        diagonal = torch.diagonal(hessian, dim1=1, dim2=2)
        # Damped as the solve is: an input that calibration never saw may still come alive later.
        damped = diagonal + (damp_percent * diagonal.mean(-1, keepdim=True)).clamp(min=1e-12)
        order = torch.argsort(damped, dim=-1, descending=True, stable=True).flip(-1)
        factor = factorise(select(select(hessian, order).mT, order), damp_percent)
        importance = torch.empty_like(damped).scatter_(1, order, factor.pivots.square())
        return cls(hessian, importance, order, factor)


@dataclass
class _Problem:
    """What the rows of a stack share."""

    grid: AffineGrid
    input: Input
    desc_act: bool
    sequence: Tensor  # [E, K]: the stored columns as they are put into groups
    hessian: Tensor  # [E, K, K], in this sequence

    @classmethod
    def of(cls, grid: AffineGrid, shared: Input, desc_act: bool) -> _Problem:
        if desc_act:
            sequence = shared.order.flip(1)
            return cls(
                grid, shared, desc_act, sequence, select(select(shared.hessian, sequence).mT, sequence)
            )
        stored = torch.arange(shared.order.shape[1], device=shared.order.device)
        return cls(grid, shared, desc_act, stored.expand_as(shared.order), shared.hessian)

    @property
    def order(self) -> Tensor:
        return self.input.order

    @property
    def factor(self) -> Factor:
        return self.input.factor

    def group_index(self) -> Tensor | None:
        """The group of each stored column [E, K], where it is not in order."""
        if not self.desc_act:
            return None
        return self.sequence.argsort(-1) // self.grid.columns_per_group(self.order.shape[1])

    def solve(self, weights: Tensor, every: int) -> Rows:
        """Quantize rows [E, N, K], and measure one in `every`."""
        return self.measured((weights, self.round(weights)), every)

    def round(self, weights: Tensor) -> Rounded:
        """Quantize rows [E, N, K]."""
        w, stored = select(weights.mT, self.sequence), self.sequence.argsort(-1)  # [E, K, N]
        places = stored.gather(1, self.order)  # of the columns, in the solver's order
        groups = places // self.grid.columns_per_group(w.shape[1])
        scales = self._fit(w.mT, self.input.importance.gather(1, self.sequence))
        codes = compensate(select(w, places), self.factor, self.grid, Columns(scales, groups))
        descent = Descent.begin(
            self.grid, w, select(codes, places.argsort(-1)), scales, self.hessian, self.factor.added
        )
        descent.run(self.factor.failed)
        missed = select(descent.error, stored) if self.desc_act else descent.error
        return Rounded(select(descent.codes, stored).mT.contiguous(), descent.scales, missed.mT)

    def measured(self, pair: tuple[Tensor, Rounded], every: int) -> Rows:
        """What was found for rows [E, N, K], with the errors of one in `every`."""
        weights, found = pair
        some = weights[:, ::every]
        plain = Columns(self._fit(some), self.order // self.grid.columns_per_group(weights.shape[2]))
        ordered = select(some.mT, self.order)
        error = select(found.missed[:, ::every].mT, self.order)
        differences = (error, rounding_error(ordered, self.grid, plain), ordered)
        costs = torch.zeros(3, *weights.shape[:2], dtype=torch.float64, device=weights.device)
        for cost, difference in zip(costs, differences, strict=True):
            cost[:, ::every] = output_error(difference, self.factor)
        return Rows(found.codes, found.scales, *costs)

    def _fit(self, weights: Tensor, importance: Tensor | None = None) -> Scales:
        """Scales [E, N, G] for weights [E, N, K] and importance [E, K]."""
        found = [
            self.grid.fit(rows, None if importance is None else importance[e])
            for e, rows in enumerate(weights)
        ]
        return Scales(torch.stack([s.scale for s in found]), torch.stack([s.offset for s in found]))


def solve(
    weights: list[Tensor],
    hessian: Tensor,
    grids: AffineGrid | Sequence[AffineGrid],
    *,
    damp_percent: float = 0.01,
    desc_act: bool = False,
    row_moments: Sequence[Tensor | None] = (),
) -> list[Solution]:
    """Quantize weights [N_i, K] that share an input with second moments `hessian` [K, K].

    `grids` is one for all or one for each; `row_moments` are those of the gradients by each weight's outputs,
    [N_i, N_i] (row_moments.py), of all weights or none. All ranks solve together, each some of the rows.
    """
    each = [grids] * len(weights) if isinstance(grids, AffineGrid) else list(grids)
    shared = Input.of(hessian[None], damp_percent)
    stacks = [weight[None] for weight in weights]
    return solve_input(stacks, shared, each, desc_act, _each_on_all_ranks, row_moments)[0]


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
        return solve_input([w[part] for w in weights], Input.of(hessian[part], damp_percent), each, desc_act)

    e = len(hessian)
    step = -(-e // torch.get_num_threads()) if hessian.device.type == "cpu" else e
    parts = [slice(start, start + step) for start in range(0, e, step)]
    return [solution for found in each_on_its_thread(solve_part, parts) for solution in found]


def _each_on_all_ranks(function: Callable[[Item], Result], items: Sequence[Item], /) -> list[Result]:
    """`each_on_its_thread`, with the threads of all ranks."""
    found = each_on_its_rank(lambda some: each_on_its_thread(function, some), shares(items))
    return [result for some in found for result in some]


def solve_input(
    weights: list[Tensor],
    shared: Input,
    grids: Sequence[AffineGrid],
    desc_act: bool = False,
    on_each: OnEach = each_on_its_thread,
    row_moments: Sequence[Tensor | None] = (),
) -> list[list[Solution]]:
    """`solve_stack` on this thread, of an input that is factored already; one grid for each weight. `row_moments` as in
    `solve`, for a stack of one."""
    members: dict[str, list[int]] = {}
    for index, grid in enumerate(grids):
        members.setdefault(grid.name, []).append(index)
    solved: dict[int, list[Solution]] = {}
    for indices in members.values():
        problem = _Problem.of(grids[indices[0]], shared, desc_act)
        moments = [of for index in indices if row_moments and (of := row_moments[index]) is not None]
        found = _solve_together(problem, [weights[index] for index in indices], on_each, moments)
        solved |= dict(zip(indices, found, strict=True))
    return [[solved[index][e] for index in range(len(weights))] for e in range(len(shared.order))]


def _solve_together(
    problem: _Problem, weights: list[Tensor], on_each: OnEach, row_moments: list[Tensor]
) -> list[list[Solution]]:
    """Solutions of each weight [E, N_i, K] on the problem's grid, E of them.

    The weights are put together along N, which changes nothing in the result (rows are independent) and saves passes;
    not those with `row_moments`.
    """
    every = MEASURED if min(weight.shape[1] for weight in weights) >= LARGE else 1
    if row_moments:
        each = zip(weights, row_moments, strict=True)
        found = Rows.joined([_solve_in_chain(problem, *pair, every, on_each) for pair in each])
    else:
        w = weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)  # [E, N, K]
        found = Rows.joined(on_each(partial(problem.solve, every=every), _pieces(w)))
    index, factor = problem.group_index(), problem.factor
    solutions: list[list[Solution]] = []
    start = 0
    for weight in weights:
        rows = slice(start, start + weight.shape[1])
        start = rows.stop
        solutions.append([])
        for e in range(len(problem.order)):
            scales = Scales(found.scales.scale[e, rows], found.scales.offset[e, rows])
            group_index = None if index is None else index[e]
            tensor = QuantizedTensor(problem.grid, found.codes[e, rows], scales, group_index)
            fallback = f"{factor.failed[e]}: {FALLBACK}" if factor.failed[e] else ""
            costs = (found.cost[e, rows], found.rtn_cost[e, rows], found.size[e, rows])
            more = not fallback and factor.dampings[e] > factor.asked
            solutions[-1].append(Solution(tensor, *costs, factor.dampings[e], more, fallback))
    return solutions


def _solve_in_chain(problem: _Problem, w: Tensor, row_moments: Tensor, every: int, on_each: OnEach) -> Rows:
    """What is found for rows w [E, N, K] that make up for each other as their outputs' moments [N, N] say."""
    rounded = in_chain(w, row_moments, lambda rows: on_each(problem.round, _pieces(rows)))
    pieces = _pieces(w)
    size = pieces[0].shape[1]
    pairs = list(zip(pieces, rounded.split(size), strict=True))
    return Rows.joined(on_each(partial(problem.measured, every=every), pairs))


def _pieces(w: Tensor) -> tuple[Tensor, ...]:
    """Rows [E, N, K] are independent: each thread takes some at a time, MEASURED or a multiple."""
    return w.split(_rows_at_once(w), dim=1)


def _rows_at_once(w: Tensor) -> int:
    threads, bound = 1, FLOATS_AT_ONCE // (w.shape[0] * w.shape[2])
    if w.device.type == "cpu":
        threads = torch.get_num_threads()
        bound = min(bound // threads, ROWS_AT_ONCE)
    return -(-max(1, min(bound, -(-w.shape[1] // threads))) // MEASURED) * MEASURED
