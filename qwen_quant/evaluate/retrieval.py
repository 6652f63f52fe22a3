"""Needle retrieval: does a model find again what stood at some depth of its context?

A passage of random tokens is put into a window of text. At the window's end its beginning is repeated, and the rest
has to follow: nothing but the passage itself can tell which tokens. What counts is the share of them that the model
puts first, so that a small model can be measured too (as its copying, not its understanding).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qwen_quant.errors import UsageError
from qwen_quant.evaluate.providers import LogitsProvider, Tokens
from qwen_quant.progress import progress

DEPTHS = (0.0, 0.25, 0.5, 0.75)  # of the window: 0 is its beginning
CUE, ANSWER = 8, 16  # tokens
TRIES = 4  # needles for each depth


def needle_retrieval(
    model: LogitsProvider, windows: npt.NDArray[np.int32], seed: int = 0
) -> dict[str, float]:
    """The share of answer tokens that come first, by depth, in windows [n, ctx] of text. Raises UsageError when a
    window has no room for needle and question."""
    ctx = windows.shape[1]
    if ctx < 4 * (CUE + ANSWER):
        raise UsageError(
            f"--needle needs windows of {4 * (CUE + ANSWER)} tokens or more; give a larger --ctx"
        )
    rng = np.random.default_rng(seed)
    vocabulary = np.unique(windows)
    found: dict[str, float] = {}
    with progress("needles", len(DEPTHS) * TRIES) as advance:
        for depth in DEPTHS:
            hits = 0
            for attempt in range(TRIES):
                needle = rng.choice(vocabulary, CUE + ANSWER).astype(np.int32)
                tokens = hidden_needle(windows[attempt % len(windows)], needle, depth)
                first = len(tokens) - ANSWER - 1  # where the prediction of the first answer token is made
                predicted = model.window_logits(tokens, first)[:ANSWER].argmax(axis=-1)
                hits += int((predicted == needle[CUE:]).sum())
                advance(1, f"depth {depth:g}")
            found[f"{depth:g}"] = hits / (TRIES * ANSWER)
    return found


def hidden_needle(text: Tokens, needle: Tokens, depth: float) -> Tokens:
    """As many tokens as `text` [ctx]: the text with `needle` at `depth`, and it again as question and answer."""
    kept = text[: len(text) - 2 * len(needle)]
    at = int(depth * len(kept))
    return np.concatenate((kept[:at], needle, kept[at:], needle))
