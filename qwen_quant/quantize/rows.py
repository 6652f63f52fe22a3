"""What is found for some rows of a stack of weights. Shapes: E problems, N rows, K columns in G groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_quant.grids.base import Scales


@dataclass
class Rounded:
    """Codes uint8 [E, N, K] in stored order, scales [E, N, G], and `missed` = W - Q [E, N, K]."""

    codes: Tensor
    scales: Scales
    missed: Tensor

    def split(self, rows: int) -> list[Rounded]:
        """The same for `rows` rows at a time."""
        parts = (x.split(rows, 1) for x in (self.codes, self.scales.scale, self.scales.offset, self.missed))
        return [
            Rounded(codes, Scales(*scales), missed) for codes, *scales, missed in zip(*parts, strict=True)
        ]


@dataclass
class Rows:
    """Codes uint8 [E, N, K] in stored order, scales [E, N, G], and diag(D H Dᵀ) [E, N] of the solve's error D, of plain
    rounding's, and of W itself."""

    codes: Tensor
    scales: Scales
    cost: Tensor
    rtn_cost: Tensor
    size: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """The same for all rows."""
        costs = joined([(part.cost, part.rtn_cost, part.size) for part in parts])
        return cls(*codes_and_scales(parts), *costs)


def codes_and_scales(parts: Sequence[Rounded] | Sequence[Rows]) -> tuple[Tensor, Scales]:
    """Those of all rows."""
    codes, *scales = joined([(part.codes, part.scales.scale, part.scales.offset) for part in parts])
    return codes, Scales(*scales)


def joined(parts: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Tensors [E, N_i, ...] of some rows each, as tensors of all rows."""
    return [torch.cat(same, dim=1) for same in zip(*parts, strict=True)]
