"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qwen_quant.runtime.sampling_params import SamplingParams

__all__ = ["Sampler", "SamplingParams"]


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

    def sample(self, logits: npt.NDArray[np.float32], history: Sequence[int] = ()) -> int:
        """The next token for `logits` [V]; `history` is what the repetition penalty looks at."""
        params = self.params
        if params.repetition_penalty != 1.0 and len(history):
            logits = penalize(logits, history, params.repetition_penalty)
        if params.temperature == 0.0:
            return int(np.argmax(logits))
        candidates = most_likely(logits, params.top_k) if params.top_k else np.arange(logits.size)
        if params.top_p < 1.0:
            candidates = nucleus(logits, candidates, params.top_p)
        if params.min_p > 0.0:
            candidates = candidates[logits[candidates] >= logits.max() + np.log(params.min_p)]
        cumulative = np.cumsum(softmax(logits[candidates] / params.temperature))
        chosen = int(np.searchsorted(cumulative, self._random.random(), side="right"))
        return int(candidates[min(chosen, candidates.size - 1)])


def penalize(
    logits: npt.NDArray[np.float32], history: Sequence[int], penalty: float
) -> npt.NDArray[np.float32]:
    """Logits [V] with those of seen tokens divided by `penalty` where positive and multiplied where negative.

    Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1, as transformers and llama.cpp apply it.
    """
    seen = np.unique(np.asarray(history, dtype=np.int64))
    result = logits.copy()
    values = result[seen]
    result[seen] = np.where(values > 0, values / penalty, values * penalty)
    return result


def most_likely(scores: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.int64]:
    """Indices of the `count` largest scores, largest first; among equals the lower index."""
    if count < scores.size:
        threshold = np.partition(scores, scores.size - count)[scores.size - count]
        indices = np.flatnonzero(scores >= threshold)
    else:
        indices = np.arange(scores.size)
    return indices[np.argsort(-scores[indices], kind="stable")][:count]


def softmax(scores: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """exp(scores) divided by their sum."""
    weights = np.exp(scores.astype(np.float64) - scores.max())
    return weights / weights.sum()


def nucleus(
    logits: npt.NDArray[np.float32], candidates: npt.NDArray[np.int64], top_p: float
) -> npt.NDArray[np.int64]:
    """The fewest most likely candidates that together reach `top_p`, most likely first.

    Holtzman et al. 2020, https://arxiv.org/abs/1904.09751, section 3.1.
    """
    probabilities = softmax(logits[candidates])
    for count in (1024, probabilities.size):  # sorting a whole vocabulary is seldom needed
        best = most_likely(probabilities, count)
        cumulative = np.cumsum(probabilities[best])
        if cumulative[-1] >= top_p:
            break
    return candidates[best[: int(np.searchsorted(cumulative, top_p)) + 1]]
