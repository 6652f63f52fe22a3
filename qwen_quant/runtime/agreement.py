"""Whether fast kernels are right: their greedy text and their logits against those of the scalar ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen_quant.errors import QwenQuantError
from qwen_quant.runtime.session import Session

# In standard deviations of a token's logits. Int8 activations that round to one side or the other leave differences of
# 0.012 (root mean square) in random models of 28 layers; where that leads to another expert, single ones reach 0.17.
DIFFERENT = 0.05
NEAR_TIE = 0.2  # between two logits, of which either may come out larger


def check_greedy(session: Session, scalar: Session, prompt: Sequence[int], n_tokens: int) -> int:
    """Generates `n_tokens` greedily with `session`, and raises QwenQuantError unless `scalar`, the same file on
    the scalar kernels, chooses the same token at each place and has about the same logits.

    A choice that rounding could have turned counts as the same. Returns how many were the same without that.
    """
    session.reset()
    tokens = list(session.generate(prompt, n_tokens))
    context = [*prompt, *tokens[:-1]]
    expected = scalar.logits(context, len(prompt) - 1)  # [n_tokens, V]
    spread = expected.std(axis=1)
    gaps = (expected.max(axis=1) - expected[np.arange(len(tokens)), tokens]) / spread
    differences = session.logits(context, len(prompt) - 1) - expected
    typical = float(np.median(np.sqrt(np.mean(differences**2, axis=1)) / spread))
    found = None
    if gaps.max() > NEAR_TIE:
        place = int(gaps.argmax())
        found = f"generate token {tokens[place]} at place {place}, the scalar ones {expected[place].argmax()}"
    elif not typical < DIFFERENT:
        found = f"and the scalar ones differ by {typical:.3f} standard deviations of the logits"
    if found:
        raise QwenQuantError(
            f"{session.file.path}: the {session.native('bench').isa} kernels {found}; "
            "run with --isa scalar, and report this CPU"
        )
    return int(np.count_nonzero(expected.argmax(axis=1) == tokens))
