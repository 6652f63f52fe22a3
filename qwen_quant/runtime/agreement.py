"""Whether fast kernels are right: their greedy text against that of the scalar ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen_quant.errors import QwenQuantError
from qwen_quant.runtime.session import Session

# A gap between two logits, in standard deviations of all of them, below which rounding may decide which is larger:
# int8 activations that round to one side or the other leave differences of 0.012 on average, in a model of 28 layers.
NEAR_TIE = 0.1


def check_greedy(session: Session, scalar: Session, prompt: Sequence[int], n_tokens: int) -> int:
    """Generates `n_tokens` greedily with `session`, and raises QwenQuantError unless `scalar`, the same file on
    the scalar kernels, chooses the same token at each place.

    A choice that rounding could have turned counts as the same. Returns how many were the same without that.
    """
    session.reset()
    tokens = list(session.generate(prompt, n_tokens))
    logits = scalar.logits([*prompt, *tokens[:-1]])[len(prompt) - 1 :]  # [n_tokens, V]
    expected = logits.argmax(axis=1)
    for place, (token, row) in enumerate(zip(tokens, logits, strict=True)):
        if row.max() - row[token] > NEAR_TIE * np.std(row):
            raise QwenQuantError(
                f"{session.file.path}: the {session.engine.isa} kernels generate token {token} at place {place}, "
                f"the scalar ones {expected[place]}; run with --isa scalar, and report this CPU"
            )
    return int(np.count_nonzero(expected == tokens))
