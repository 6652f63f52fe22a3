"""How far an artifact's predictions are from the reference's, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


def kl_divergence(
    reference: npt.NDArray[np.float64], other: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """KL(reference ‖ other) [T] in nats, of natural log-probabilities [T, V] (Kullback & Leibler 1951)."""
    divergence: npt.NDArray[np.float64] = (np.exp(reference) * (reference - other)).sum(axis=-1)
    return np.maximum(divergence, 0.0)  # rounding can leave equal distributions a hair below zero


@dataclass
class Divergence:
    """Collects the divergence and the agreement of every scored token."""

    same_top: int = 0
    _blocks: list[npt.NDArray[np.float64]] = field(default_factory=list, repr=False)

    def add(self, reference: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> None:
        """Compare log-probabilities [T, V] of the same tokens."""
        self._blocks.append(kl_divergence(reference, other))
        self.same_top += int((reference.argmax(axis=-1) == other.argmax(axis=-1)).sum())

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """KLD of every scored token [n], in nats."""
        return np.concatenate(self._blocks)

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def stderr(self) -> float:
        """Standard error of the mean: sqrt((E[x²] - E[x]²) / (n - 1))."""
        values = self.values
        return float(values.std()) / math.sqrt(max(len(values) - 1, 1))

    def percentile(self, q: float) -> float:
        """The value below which `q` percent of the tokens lie, interpolated linearly."""
        return float(np.percentile(self.values, q))

    @property
    def top1_agreement(self) -> float:
        """Share of tokens whose most likely continuation is the same, 0 to 1."""
        return self.same_top / len(self.values)
