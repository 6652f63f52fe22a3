"""Perplexity as llama.cpp's perplexity tool defines it.

The text is tokenized whole and cut into consecutive windows of `ctx` tokens; a rest shorter than a window is
left out. Qwen has no beginning-of-sequence token, so a window is read as it is. The model reads the whole
window, and its predictions after the tokens from ctx // 2 on are scored: `ctx - ctx // 2 - 1` in each.
Definition: https://github.com/ggml-org/llama.cpp/tree/master/tools/perplexity (`perplexity`, no stride).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qwen_quant.errors import QwenQuantError, UsageError
from qwen_quant.tokenizer import Tokenizer
from qwen_quant.tokenizer_vocabulary import USER_DEFINED

MIN_CTX = 8
ROWS = 16  # rows turned to float64 at a time, so that a large vocabulary does not double its window in memory


def tokenize(tokenizer: Tokenizer, text: str) -> npt.NDArray[np.int32]:
    """Ids [T] of `text`, of which only the tokens that carry no control (`<think>`) are found as tokens.

    llama.cpp's tool tokenizes without parsing control tokens: `<|im_end|>` in the data is text.
    """
    types = tokenizer.token_types
    spoken = [t.content for i, t in tokenizer.added_tokens.items() if types[i] == USER_DEFINED]
    if not spoken:
        return np.asarray(tokenizer.encode(text), dtype=np.int32)
    pattern = "|".join(map(re.escape, sorted(spoken, key=len, reverse=True)))
    ids: list[int] = []
    for piece in re.split(f"({pattern})", text):
        if piece:
            ids += tokenizer.encode(piece, special=piece in spoken)
    return np.asarray(ids, dtype=np.int32)


def cut_windows(
    tokens: npt.NDArray[np.int32], ctx: int, max_windows: int | None = None
) -> npt.NDArray[np.int32]:
    """The windows [n, ctx] of `tokens` [T]. Raises QwenQuantError when there is not even one."""
    if ctx < MIN_CTX:
        raise UsageError(f"--ctx {ctx} is too small; it has to be {MIN_CTX} or more")
    if max_windows is not None and max_windows < 1:
        raise UsageError(f"--max-windows {max_windows} leaves nothing to score; it has to be 1 or more")
    count = len(tokens) // ctx
    if count == 0:
        raise QwenQuantError(
            f"the text has {len(tokens)} tokens, less than one window of {ctx}; "
            "give a longer --data or a smaller --ctx"
        )
    count = count if max_windows is None else min(count, max_windows)
    return tokens[: count * ctx].reshape(count, ctx)


def first_scored(ctx: int) -> int:
    """The first position of a window whose prediction is scored."""
    return ctx // 2


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Natural log-probabilities [T, V] of logits [T, V], in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def row_blocks(rows: int) -> Iterator[slice]:
    """Slices that cover `rows` rows in turn."""
    for start in range(0, rows, ROWS):
        yield slice(start, min(start + ROWS, rows))


@dataclass
class Perplexity:
    """Sums the surprise of scored tokens."""

    tokens: int = 0
    nll_sum: float = 0.0
    nll_squares: float = field(default=0.0, repr=False)

    def add(self, log_probs: npt.NDArray[np.float64], targets: npt.NDArray[np.int32]) -> None:
        """Score targets [T] by log_probs [T, V]."""
        nll = -log_probs[np.arange(len(targets)), targets]
        self.tokens += len(targets)
        self.nll_sum += float(nll.sum())
        self.nll_squares += float(np.square(nll).sum())

    @property
    def value(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(self.nll_sum / self.tokens)

    @property
    def stderr(self) -> float:
        """Standard error of `value`: that of the mean log-likelihood, times the slope of exp there."""
        mean = self.nll_sum / self.tokens
        variance = max(self.nll_squares / self.tokens - mean * mean, 0.0)
        return math.sqrt(variance / max(self.tokens - 1, 1)) * self.value
