"""Does a file that was just written compute what the checkpoint it came from computes?

Looks for mistakes, not for lost quality: a wrong byte order or a missing norm shows as a divergence of whole nats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import ConfigError, FormatError
from qwen_quant.evaluate.divergence import Divergence
from qwen_quant.evaluate.perplexity import MIN_CTX, cut_windows, log_softmax, row_blocks, tokenize
from qwen_quant.evaluate.report import HELD_OUT, read_text, renormalized
from qwen_quant.runtime.session import Session
from qwen_quant.tokenizer import Tokenizer

WINDOWS, WINDOW, GREEDY = 4, 96, 16
# Largest mean divergence (nats) by the bits of the weights, where the reference has more; rounding of activations and
# of the embedding alone stays far below the first.
LIMITS = {16: 0.05, 8: 0.1, 4: 2.0}
NEAR_TIE = 0.2  # a logit this close to the best may win when sums run in another order
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is 2 + 2? <|im_end|>"},
]


def self_check(
    artifact: Path, checkpoint: Checkpoint, bits: int, where: Path | None = None
) -> dict[str, Any]:
    """Run `artifact` beside the reference model over `checkpoint` on held-out text; what was measured.

    `bits` are those of the artifact's weights, 16 when the checkpoint holds the same integers; `where` is what messages
    call an artifact that has not got its name yet. Raises FormatError when tokens, templates or ends of turns differ,
    when the divergence is beyond what `bits` can explain, or when decoding step by step does not give what reading the
    same text at once does.
    """
    from qwen_quant.evaluate.streamed import streamed_logits

    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    windows = _windows(checkpoint, tokenizer)
    # Before the artifact is opened: layers of the one and weights of the other never lie in memory together.
    reference = streamed_logits(checkpoint, windows)
    session = Session.open(artifact)
    artifact = where or artifact
    _check_text(session, tokenizer, artifact)
    divergence = Divergence()
    for window, wanted in zip(windows, reference, strict=True):
        found = session.logits(window)
        if not np.isfinite(found).all():
            raise FormatError(f"{artifact}: computes NaN or infinite logits; export it again")
        shared = min(found.shape[1], wanted.shape[1])
        for rows in row_blocks(len(window)):
            theirs, ours = (renormalized(log_softmax(x[rows]), shared) for x in (wanted, found))
            divergence.add(theirs, ours)
    limit = next(LIMITS[b] for b in LIMITS if bits >= b)
    if not divergence.mean <= limit:
        raise FormatError(
            f"{artifact}: diverges from {checkpoint.folder} by {divergence.mean:.3g} nats per token, where {limit} "
            "is the most that its weights explain; the export is wrong (--no-verify keeps it)"
        )
    agreed = _check_greedy(session, windows[0][: WINDOW // 2], artifact, reference[0])
    return {
        "kld_mean": divergence.mean,
        "kld_max": divergence.percentile(100),
        "top1_agreement": divergence.top1_agreement,
        "tokens": int(windows.size),
        "first_greedy_token_agrees": agreed,
        "greedy_tokens": GREEDY,
    }


def _windows(checkpoint: Checkpoint, tokenizer: Tokenizer) -> npt.NDArray[np.int32]:
    """Windows [n, T] of held-out text."""
    room = min(WINDOW, checkpoint.spec.plain_context - GREEDY)
    windows = cut_windows(tokenize(tokenizer, read_text(HELD_OUT)), max(room, MIN_CTX), WINDOWS)
    if int(windows.max()) >= checkpoint.spec.vocab_size:
        raise FormatError(
            f"{checkpoint.folder}: the tokenizer gives id {int(windows.max())}, beyond vocab_size "
            f"{checkpoint.spec.vocab_size}; tokenizer and weights do not belong together"
        )
    return windows


def _check_text(session: Session, theirs: Tokenizer, artifact: Path) -> None:
    """Compare tokens, the chat template and the ends of turns with those of the checkpoint."""
    ours, text = session.tokenizer, read_text(HELD_OUT)
    if not np.array_equal(tokenize(theirs, text), tokenize(ours, text)):
        raise FormatError(f"{artifact}: its tokenizer gives other tokens than the checkpoint's")
    if _rendered(ours) != _rendered(theirs):
        raise FormatError(f"{artifact}: its chat template gives other tokens than the checkpoint's")
    missing = set(theirs.eos_ids) - session.eos_ids
    if missing:
        raise FormatError(
            f"{artifact}: does not stop at {sorted(missing)}, which end a turn in the checkpoint"
        )


def _rendered(tokenizer: Tokenizer) -> list[int] | None:
    """A conversation as tokens; None for base models without ChatML's tokens."""
    try:
        return tokenizer.apply_chat_template(MESSAGES)
    except ConfigError:
        return None


def _check_greedy(
    session: Session, prompt: npt.NDArray[np.int32], artifact: Path, reference: npt.NDArray[np.float32]
) -> bool:
    """Whether the first token after the prompt is the reference's; that steps agree with reading at once is checked."""
    session.reset()
    made = list(session.generate(prompt.tolist(), GREEDY))
    at_once = session.logits([*prompt.tolist(), *made], len(prompt) - 1)[:-1]  # [GREEDY, V]
    behind = at_once.max(axis=-1) - at_once[np.arange(len(made)), made]
    if (behind > NEAR_TIE).any():
        raise FormatError(
            f"{artifact}: token {int(behind.argmax())} of a greedy answer is not the one that reading the same text "
            "at once gives; the export is wrong (--no-verify keeps it)"
        )
    return bool(made[0] == reference[len(prompt) - 1].argmax())
