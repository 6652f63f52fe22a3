"""Needle retrieval: does a model find again what stood at some depth of its context?

A passage of random tokens is put into a window of text. At the window's end its beginning is repeated, and the rest
has to follow: nothing but the passage itself can tell which tokens. What counts is the share of them that the model
puts first, and how much more likely they have become since they were read: a model that is too small to put them first
still copies a little, and a cache that blurs what it reads takes that away.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qwen_quant.errors import UsageError
from qwen_quant.evaluate.perplexity import log_softmax
from qwen_quant.evaluate.providers import LogitsProvider, Tokens
from qwen_quant.progress import progress

DEPTHS = (0.0, 0.25, 0.5, 0.75)  # of the window: 0 is its beginning
CUE, ANSWER = 8, 16  # tokens
TRIES = 4  # needles for each depth


@dataclass(frozen=True)
class Retrieval:
    """By depth: the share of answer tokens that come first, and their gain in log-probability over when they were
    read, in nats per token."""

    share: dict[str, float] = field(default_factory=dict)
    gain: dict[str, float] = field(default_factory=dict)


def needle_retrieval(model: LogitsProvider, windows: npt.NDArray[np.int32], seed: int = 0) -> Retrieval:
    """Needles in windows [n, ctx] of text. Raises UsageError when a window has no room for needle and question."""
    ctx = windows.shape[1]
    if ctx < 4 * (CUE + ANSWER):
        raise UsageError(
            f"--needle needs windows of {4 * (CUE + ANSWER)} tokens or more; give a larger --ctx"
        )
    rng = np.random.default_rng(seed)
    vocabulary = np.unique(windows)
    found = Retrieval()
    with progress("needles", len(DEPTHS) * TRIES) as advance:
        for depth in DEPTHS:
            hits, gain = 0, 0.0
            for attempt in range(TRIES):
                needle = rng.choice(vocabulary, CUE + ANSWER).astype(np.int32)
                answer = needle[CUE:]
                tokens, at = hidden_needle(windows[attempt % len(windows)], needle, depth)
                first = at + CUE - 1  # where the prediction of the first answer token is made
                logits = model.window_logits(tokens, first)
                read, asked = logits[:ANSWER], logits[-ANSWER - 1 : -1]
                hits += int((asked.argmax(axis=-1) == answer).sum())
                rows = np.arange(ANSWER)
                gain += float((log_softmax(asked)[rows, answer] - log_softmax(read)[rows, answer]).sum())
                advance(1, f"depth {depth:g}")
            found.share[f"{depth:g}"] = hits / (TRIES * ANSWER)
            found.gain[f"{depth:g}"] = gain / (TRIES * ANSWER)
    return found


def hidden_needle(text: Tokens, needle: Tokens, depth: float) -> tuple[Tokens, int]:
    """As many tokens as `text` [ctx]: the text with `needle` at `depth`, and it again as question and answer; and where
    it begins."""
    kept = text[: len(text) - 2 * len(needle)]
    at = int(depth * len(kept))
    return np.concatenate((kept[:at], needle, kept[at:], needle)), at
