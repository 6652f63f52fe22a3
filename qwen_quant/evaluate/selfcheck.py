"""Does a file that was just written compute what the checkpoint it came from computes?

Looks for mistakes, not for lost quality: a wrong byte order or a missing norm shows as a divergence of whole nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import ConfigError, FormatError
from qwen_quant.evaluate.divergence import Divergence
from qwen_quant.evaluate.perplexity import MIN_CTX, cut_windows, log_softmax, row_blocks, tokenize
from qwen_quant.evaluate.report import HELD_OUT, read_text, renormalized
from qwen_quant.progress import progress
from qwen_quant.quantize.heap import give_back_memory
from qwen_quant.runtime.onnx import is_onnx_folder
from qwen_quant.runtime.session import Session
from qwen_quant.tokenizer import Tokenizer

WINDOWS, WINDOW, GREEDY = 4, 96, 16
# Largest mean divergence (nats) by the bits of the weights, where the reference has more; rounding of activations and
# of the embedding alone stays far below the first.
LIMITS = {16: 0.05, 8: 0.1, 5: 1.0, 4: 2.0, 3: 4.0, 2: 8.0}
NEAR_TIE = 0.2  # a logit this close to the best may win when sums run in another order
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is 2 + 2? <|im_end|>"},
]

Logits = npt.NDArray[np.float32]


def divergence_limit(bits: int) -> float:
    """The largest mean divergence, in nats, that weights of so many bits explain."""
    return next((LIMITS[least] for least in LIMITS if bits >= least), LIMITS[min(LIMITS)])


def self_check(
    artifact: Path, checkpoint: Checkpoint, bits: int, where: Path | None = None
) -> dict[str, Any]:
    """Run `artifact` beside the reference model over `checkpoint` on held-out text; what was measured.

    A GGUF file or ONNX folder runs as it will for its users, a GPTQ checkpoint in the reference model, layer by layer.
    `bits` are those of the artifact's weights, 16 when the checkpoint holds the same integers; `where` is what
    messages call an artifact that has not got its name yet. Raises FormatError when tokens, templates or ends of
    turns differ, when the divergence is beyond what `bits` can explain, or when decoding step by step does not give
    what reading the same text at once does.
    """
    from qwen_quant.evaluate.streamed import streamed_logits

    where = where or artifact
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    windows = _windows(checkpoint, tokenizer)
    layers = checkpoint.spec.num_hidden_layers
    if not runs(artifact):
        ours = Tokenizer.from_folder(artifact)
        _check_text(ours, frozenset(ours.eos_ids), tokenizer, where)
        with progress("checking", 2 * layers) as advance:
            reference = _rows(streamed_logits(checkpoint, windows, advance))
            found = _rows(streamed_logits(Checkpoint(artifact), windows, advance))
            return _compared(found, reference, bits, where, checkpoint)
    with progress("checking", layers + WINDOWS) as advance:
        # The artifact is opened twice: layers of the one and weights of the other never lie in memory together.
        answered, steps = windows[:1].copy(), min(GREEDY, windows.shape[1] // 2)
        give_back_memory()  # that what wrote the artifact has freed
        session = Session.open(artifact, n_ctx=windows.shape[1])
        answered[0, -steps:] = _greedy(session, tokenizer, windows[0][:-steps], steps, where)
        del session
        reference = streamed_logits(checkpoint, np.concatenate((answered, windows)), advance)
        best = next(reference)[-steps - 1 : -1].argmax(axis=-1)
        found = _read(Session.open(artifact, n_ctx=windows.shape[1]), windows, advance)
        measured = _compared(found, _rows(reference), bits, where, checkpoint)
        agreed = float((best == answered[0, -steps:]).mean())
        return {**measured, "greedy_tokens": steps, "greedy_agreement": agreed}


def runs(artifact: Path) -> bool:
    """Whether an artifact is one that a Session opens, so that its check holds all of it in memory."""
    return artifact.is_file() or is_onnx_folder(artifact)


def _windows(checkpoint: Checkpoint, tokenizer: Tokenizer) -> npt.NDArray[np.int32]:
    """Windows [n, T] of held-out text."""
    room = min(WINDOW, checkpoint.spec.plain_context)
    windows = cut_windows(tokenize(tokenizer, read_text(HELD_OUT)), max(room, MIN_CTX), WINDOWS)
    if int(windows.max()) >= checkpoint.spec.vocab_size:
        raise FormatError(
            f"{checkpoint.folder}: the tokenizer gives id {int(windows.max())}, beyond vocab_size "
            f"{checkpoint.spec.vocab_size}; tokenizer and weights do not belong together"
        )
    return windows


def _rows(logits: Iterable[Logits]) -> Iterator[Logits]:
    """Logits [T, V] of windows, a few rows at a time."""
    for window in logits:
        for rows in row_blocks(len(window)):
            yield window[rows]
        del window  # before the next one comes


def _read(
    session: Session, windows: npt.NDArray[np.int32], advance: Callable[[float, str], None]
) -> Iterator[Logits]:
    """What a session makes of the same rows: of a large vocabulary a whole window's logits would count."""
    for window in windows:
        session.reset()
        for rows in row_blocks(len(window)):
            yield session.extend(window[rows])
        advance(1, "")


def _compared(
    found: Iterable[Logits], reference: Iterable[Logits], bits: int, where: Path, checkpoint: Checkpoint
) -> dict[str, Any]:
    """Divergence and agreement of the same rows of logits [R, V]. Raises FormatError when they are too far off."""
    divergence = Divergence()
    for ours, theirs in zip(found, reference, strict=True):
        _check_finite(ours, where)
        shared = min(ours.shape[1], theirs.shape[1])
        for half in np.array_split(np.arange(len(ours)), 2):
            divergence.add(*(renormalized(log_softmax(logits[half]), shared) for logits in (theirs, ours)))
    limit = divergence_limit(bits)
    if not divergence.mean <= limit:
        raise FormatError(
            f"{where}: diverges from {checkpoint.folder} by {divergence.mean:.3g} nats per token, where {limit} "
            f"is the most that its weights explain; the export is wrong (--no-verify keeps it)"
        )
    return {
        "kld_mean": divergence.mean,
        "kld_max": divergence.percentile(100),
        "top1_agreement": divergence.top1_agreement,
        "tokens": len(divergence.values),
    }


def _check_finite(logits: Logits, where: Path) -> None:
    if not np.isfinite(logits).all():
        raise FormatError(f"{where}: computes NaN or infinite logits; export it again")


def _check_text(ours: Tokenizer, ends: frozenset[int], theirs: Tokenizer, where: Path) -> None:
    """Compare tokens, the chat template and the ends of turns with those of the checkpoint."""
    text = read_text(HELD_OUT)
    if not np.array_equal(tokenize(theirs, text), tokenize(ours, text)):
        raise FormatError(f"{where}: its tokenizer gives other tokens than the checkpoint's")
    if _rendered(ours) != _rendered(theirs):
        raise FormatError(f"{where}: its chat template gives other tokens than the checkpoint's")
    missing = set(theirs.eos_ids) - ends
    if missing:
        raise FormatError(f"{where}: does not stop at {sorted(missing)}, which end a turn in the checkpoint")


def _rendered(tokenizer: Tokenizer) -> list[int] | None:
    """A conversation as tokens; None for base models without ChatML's tokens."""
    try:
        return tokenizer.apply_chat_template(MESSAGES)
    except ConfigError:
        return None


def _greedy(
    session: Session, tokenizer: Tokenizer, prompt: npt.NDArray[np.int32], steps: int, where: Path
) -> list[int]:
    """The greedy tokens after the prompt; that text goes in and out as with `tokenizer`, and that steps agree with
    reading at once, is checked."""
    _check_text(session.tokenizer, session.eos_ids, tokenizer, where)
    made = list(session.generate(prompt.tolist(), steps))
    at_once = session.logits([*prompt.tolist(), *made], len(prompt) - 1)[:-1]  # [steps, V]
    _check_finite(at_once, where)
    behind = at_once.max(axis=-1) - at_once[np.arange(steps), made]
    if (behind > NEAR_TIE).any():
        raise FormatError(
            f"{where}: token {int(behind.argmax())} of a greedy answer is not the one that reading the same text "
            "at once gives; the export is wrong (--no-verify keeps it)"
        )
    return made
