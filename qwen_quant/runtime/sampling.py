"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qwen_quant.runtime.sampling_params import SamplingParams

__all__ = ["Sampler", "SamplingParams"]

Logits = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
ROWS = 64  # scores in a column of `lower_bound`


class Sampler:
    """Applies SamplingParams; draws are reproducible from the seed.

    The order is llama.cpp's: repetition penalty, top-k, top-p, min-p, temperature. The filters see
    probabilities at temperature 1.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params

    @cached_property
    def _random(self) -> np.random.Generator:
        return np.random.default_rng(self.params.seed)

    def sample(self, logits: Logits, history: Sequence[int] = ()) -> int:
        """The next token for `logits` [V]; `history` is what the repetition penalty looks at."""
        params = self.params
        if params.repetition_penalty != 1.0 and len(history):
            logits = penalize(logits, history, params.repetition_penalty)
        if params.temperature == 0.0:
            return int(np.argmax(logits))
        candidates = most_likely(logits, params.top_k) if params.top_k else None
        if params.top_p < 1.0:
            candidates = nucleus(logits, candidates, params.top_p)
        if params.min_p > 0.0:
            enough = taken(logits, candidates) >= logits.max() + np.log(params.min_p)
            candidates = np.flatnonzero(enough) if candidates is None else candidates[enough]
        cumulative = np.cumsum(softmax(taken(logits, candidates) / params.temperature))
        chosen = int(np.searchsorted(cumulative, self._random.random(), side="right"))
        chosen = min(chosen, cumulative.size - 1)
        return chosen if candidates is None else int(candidates[chosen])


def penalize(logits: Logits, history: Sequence[int], penalty: float) -> Logits:
    """Logits [V] with those of seen tokens divided by `penalty` where positive and multiplied where negative.

    Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1, as transformers and llama.cpp apply it.
    """
    seen = np.asarray(history, dtype=np.int64)
    result = logits.copy()
    values = logits[seen]
    result[seen] = np.where(values > 0, values / penalty, values * penalty)
    return result


def taken(logits: Logits, candidates: Indices | None) -> Logits:
    """The candidates' logits; without candidates, all."""
    return logits if candidates is None else logits[candidates]


def most_likely(scores: npt.NDArray[np.floating], count: int) -> Indices:
    """Indices of the `count` largest scores, largest first; among equals the lower index."""
    if count < scores.size:
        indices = np.flatnonzero(scores >= lower_bound(scores, count))
        if count < indices.size:
            best = np.partition(scores[indices], indices.size - count)[indices.size - count]
            indices = indices[scores[indices] >= best]
    else:
        indices = np.arange(scores.size)
    return indices[np.argsort(-scores[indices], kind="stable")][:count]


def lower_bound(scores: npt.NDArray[np.floating], count: int) -> float:
    """What at least `count` scores reach, close below the last of the `count` largest where they are few.

    Each of the columns that the scores are laid out in has its largest: `count` of these are scores, too.
    """
    n_columns = scores.size // ROWS
    if count > n_columns // 2:
        return float("-inf")
    largest = scores[: n_columns * ROWS].reshape(ROWS, n_columns).max(axis=0)
    return float(np.partition(largest, n_columns - count)[n_columns - count])


def softmax(scores: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """exp(scores) divided by their sum."""
    weights = scores.astype(np.float64)
    weights -= scores.max()
    np.exp(weights, out=weights)
    weights /= weights.sum()
    return weights


def nucleus(logits: Logits, candidates: Indices | None, top_p: float) -> Indices:
    """The fewest most likely candidates that together reach `top_p`, most likely first.

    Holtzman et al. 2020, https://arxiv.org/abs/1904.09751, section 3.1.
    """
    probabilities = softmax(taken(logits, candidates))
    for count in (256, 4096, probabilities.size):  # sorting a whole vocabulary is seldom needed
        best = most_likely(probabilities, count)
        cumulative = np.cumsum(probabilities[best])
        if cumulative[-1] >= top_p:
            break
    best = best[: int(np.searchsorted(cumulative, top_p)) + 1]
    return best if candidates is None else candidates[best]
