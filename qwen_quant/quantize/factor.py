"""The Cholesky factor of a damped Hessian, and the output errors that it measures.

With H = L Lᵀ the error D costs tr(D H Dᵀ) = |D L|². L is lower triangular, so column j of D L depends on column j of
D and on those after it: rounding from the last column to the first, each choice can make up for all before it.
Shapes: E problems, N rows, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_quant.errors import CalibrationError

DAMPING_STEPS = 4  # each ten times the one before, when the factorisation fails
BLOCK = 256  # columns of D L computed at once
NOT_DEFINITE = "hessian not positive definite"
NO_INPUT = "inputs are all zero"


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
    asked: float  # the damping to begin with
    failed: list[str]  # why no damping helped, empty where one did

    def undamped(self, cost: Tensor, difference: Tensor) -> Tensor:
        """`cost` [E, N] of `difference` [E, K, N] without what damping added to it."""
        extra = difference.square().sum(1, dtype=torch.float64) * self.added[:, None]
        return (cost - extra).clamp_(min=0)


def factorise(hessian: Tensor, damp_percent: float) -> Factor:
    """Factor each H [E, K, K], damped by `damp_percent` of its mean diagonal, and by more where that fails.

    `hessian` is damped in its place meanwhile: for a wide layer a copy would be the largest tensor of the run.
    A Hessian of low rank needs no more than that damping, one of zeros has none that helps. Raises CalibrationError
    for one that is not finite.
    """
    diagonal = torch.diagonal(hessian, dim1=1, dim2=2)  # a view
    undamped = diagonal.clone()
    if not torch.isfinite(undamped).all():
        raise CalibrationError(
            "second moments are not finite; the activations they come from are not, or too large"
        )
    means = undamped.mean(-1)
    dampings, open_ = [0.0] * len(hessian), list(range(len(hessian)))
    factor = None
    damping = damp_percent
    for _ in range(DAMPING_STEPS):
        diagonal.copy_(undamped + damping * means[:, None])
        spread, info = torch.linalg.cholesky_ex(hessian if factor is None else hessian[open_])
        pivots = torch.diagonal(spread, dim1=1, dim2=2).clone()
        spread /= pivots[:, None, :]
        # A value that is not finite, wherever it stands in a row of L, makes the row's diagonal so.
        good = ((info == 0) & torch.isfinite(pivots).all(-1)).tolist()
        if factor is None:
            factor = Factor(spread, pivots, damping * means, dampings, damp_percent, [])
        else:
            factor.spread[open_], factor.pivots[open_], factor.added[open_] = (
                spread,
                pivots,
                damping * means[open_],
            )
        for index in open_:
            dampings[index] = damping
        open_ = [index for index, fine in zip(open_, good, strict=True) if not fine]
        if not open_:
            break
        damping *= 10
    diagonal.copy_(undamped)
    assert factor is not None
    factor.failed = [""] * len(hessian)
    for index in open_:
        factor.failed[index] = NOT_DEFINITE if means[index] else NO_INPUT
        factor.spread[index] = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
        factor.added[index] = damp_percent * means[index]
        factor.pivots[index] = (undamped[index] + factor.added[index]).clamp(min=0).sqrt()
    return factor


def output_error(difference: Tensor, factor: Factor) -> Tensor:
    """diag(D H Dᵀ) [E, N] of `difference` D [E, K, N]: how far D moves each row's outputs, squared, on average."""
    e, k, n = difference.shape
    cost = torch.zeros(e, n, dtype=torch.float64, device=difference.device)
    for start in range(0, k, BLOCK):
        columns = slice(start, start + BLOCK)
        found = torch.bmm(factor.spread[:, start:, columns].mT, difference[:, start:])
        cost += found.mul_(factor.pivots[:, columns, None]).square_().sum(1, dtype=torch.float64)
    return factor.undamped(cost, difference)
