"""The Cholesky factor of a damped Hessian, and the output errors that it measures.

With H = L Lᵀ the error D costs tr(D H Dᵀ) = |D L|². L is lower triangular, so column j of D L depends on column j of
D and on those after it: rounding from the last column to the first, each choice can make up for all before it.
Shapes: E problems, N rows, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING_STEPS = 4  # each ten times the one before, when the factorisation fails
BLOCK = 256  # columns of D L computed at once


@dataclass
class Factor:
    """The damped H [E, K, K] = L Lᵀ with L = spread * pivots; `spread` has ones on its diagonal, so that its column j
    says how much of the errors of the columns after j makes up for column j.

    Where no damping helped, L is diag(H)^(1/2), which spreads nothing.
    """

    spread: Tensor  # [E, K, K]
    pivots: Tensor  # [E, K]
    added: Tensor  # [E]: what damping added to the diagonal
    dampings: list[float]  # the same as a share of the mean diagonal
    failed: list[bool]

    def undamped(self, cost: Tensor, difference: Tensor) -> Tensor:
        """`cost` [E, N] of `difference` [E, K, N] without what damping added to it."""
        extra = difference.square().sum(1, dtype=torch.float64) * self.added[:, None]
        return (cost - extra).clamp_(min=0)


def factorise(hessian: Tensor, damp_percent: float) -> Factor:
    """Factor each H [E, K, K], damped by `damp_percent` of its mean diagonal, and by more where that fails."""
    diagonal = torch.diagonal(hessian, dim1=1, dim2=2)
    means = diagonal.mean(-1)
    spread = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device).repeat(
        len(hessian), 1, 1
    )
    pivots = (diagonal + damp_percent * means[:, None]).clamp(min=0).sqrt()
    added = damp_percent * means
    dampings, open_ = [0.0] * len(hessian), list(range(len(hessian)))
    damping = damp_percent
    for _ in range(DAMPING_STEPS):
        damped = hessian[open_]
        damped.diagonal(dim1=1, dim2=2).add_(damping * means[open_, None])
        lower, info = torch.linalg.cholesky_ex(damped)
        found = torch.diagonal(lower, dim1=1, dim2=2)
        # A value that is not finite, wherever it stands in a row of L, makes the row's diagonal so.
        good = ((info == 0) & torch.isfinite(found).all(-1)).tolist()
        for place, (index, fine) in enumerate(zip(open_, good, strict=True)):
            dampings[index] = damping
            if fine:
                torch.div(lower[place], found[place], out=spread[index])
                pivots[index], added[index] = found[place], damping * means[index]
        open_ = [index for index, fine in zip(open_, good, strict=True) if not fine]
        if not open_:
            break
        damping *= 10
    return Factor(spread, pivots, added, dampings, [index in open_ for index in range(len(hessian))])


def output_error(difference: Tensor, factor: Factor) -> Tensor:
    """diag(D H Dᵀ) [E, N] of `difference` D [E, K, N]: how far D moves each row's outputs, squared, on average."""
    e, k, n = difference.shape
    cost = torch.zeros(e, n, dtype=torch.float64, device=difference.device)
    for start in range(0, k, BLOCK):
        columns = slice(start, start + BLOCK)
        found = torch.bmm(factor.spread[:, start:, columns].mT, difference[:, start:])
        cost += spread_cost(found, factor, columns)
    return factor.undamped(cost, difference)


def spread_cost(found: Tensor, factor: Factor, columns: slice) -> Tensor:
    """The squares of some columns of D L summed [E, N], of D spread [E, M, N] (overwritten)."""
    return found.mul_(factor.pivots[:, columns, None]).square_().sum(1, dtype=torch.float64)
