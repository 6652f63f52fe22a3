"""Measuring an artifact against its reference over one text, window by window, and telling the result."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qwen_quant.errors import QwenQuantError
from qwen_quant.evaluate.divergence import Divergence
from qwen_quant.evaluate.perplexity import (
    Perplexity,
    cut_windows,
    first_scored,
    log_softmax,
    row_blocks,
    tokenize,
)
from qwen_quant.evaluate.providers import LogitsProvider, Tokens, open_provider
from qwen_quant.evaluate.retrieval import needle_retrieval
from qwen_quant.progress import progress

if TYPE_CHECKING:
    from rich.table import Table

# Written for this project and kept out of the calibration data: English, Chinese and code.
HELD_OUT = Path(__file__).parent / "held_out.txt"


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found; without a reference the fields that compare are None.

    Perplexities are per token, divergences KL(reference ‖ artifact) in nats; `top1_agreement`
    is a share from 0 to 1, `tokens` counts the scored ones, `seconds` is the time for both models.
    """

    artifact: str
    ppl: float
    ppl_stderr: float
    tokens: int
    windows: int
    ctx: int
    seconds: float
    data: str = ""
    data_sha256: str = ""
    reference: str | None = None
    ppl_reference: float | None = None
    ppl_reference_stderr: float | None = None
    kld_mean: float | None = None
    kld_stderr: float | None = None
    kld_median: float | None = None
    kld_p99: float | None = None
    kld_max: float | None = None
    top1_agreement: float | None = None
    kv_cache: str | None = None
    kv_bytes_per_token: float | None = None
    kv_recent_bytes: int | None = None  # of recent tokens in FP16, whatever the context
    retrieval: dict[str, float] | None = None  # by depth: see retrieval.py
    retrieval_gain: dict[str, float] | None = None
    retrieval_reference: dict[str, float] | None = None
    retrieval_gain_reference: dict[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, as `eval --json` prints them."""
        return asdict(self)

    def table(self) -> Table:
        """The result for a terminal."""
        from rich.table import Table

        table = Table(title=f"{self.tokens:,} tokens scored in {self.windows} windows of {self.ctx}")
        table.add_column("measure")
        table.add_column("value", justify="right")
        for label, value in self._lines():
            table.add_row(label, value)
        return table

    def _lines(self) -> list[tuple[str, str]]:
        lines = [("perplexity", f"{self.ppl:.4f} ± {self.ppl_stderr:.4f}")]
        if self.kv_bytes_per_token is not None:
            lines.append(
                (f"KV cache {self.kv_cache or 'f16'}, bytes per token", f"{self.kv_bytes_per_token:,.0f}")
            )
        if self.kv_recent_bytes:
            lines.append(("and in all, of recent tokens", f"{self.kv_recent_bytes:,}"))
        for name, shares, gains in (
            ("retrieval", self.retrieval, self.retrieval_gain),
            ("reference's", self.retrieval_reference, self.retrieval_gain_reference),
        ):
            lines += [
                (f"{name} at depth {depth}", f"{100 * share:.0f} %, {(gains or {})[depth]:+.2f} nats")
                for depth, share in (shares or {}).items()
            ]
        if self.ppl_reference is None:
            return lines
        return [
            *lines,
            ("perplexity of the reference", f"{self.ppl_reference:.4f} ± {self.ppl_reference_stderr:.4f}"),
            ("KLD mean (nats)", f"{self.kld_mean:.4g} ± {self.kld_stderr:.2g}"),
            ("KLD median", f"{self.kld_median:.4g}"),
            ("KLD 99th percentile", f"{self.kld_p99:.4g}"),
            ("KLD maximum", f"{self.kld_max:.4g}"),
            ("top-1 agreement", f"{100 * (self.top1_agreement or 0.0):.2f} %"),
        ]


def read_text(path: Path) -> str:
    """The text of `path`. Raises QwenQuantError when it is missing, empty or not UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise QwenQuantError(
            f"{path}: cannot be read ({error.strerror}); name a text file with --data"
        ) from None
    except UnicodeDecodeError as error:
        raise QwenQuantError(f"{path}: is not UTF-8 text (byte {error.start}); convert it first") from None
    if not text.strip():
        raise QwenQuantError(f"{path}: is empty; name a text file with --data")
    return text


def evaluate(
    artifact: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None = None,
    data: Path = HELD_OUT,
    *,
    ctx: int = 512,
    max_windows: int | None = None,
    n_threads: int | None = None,
    isa: str = "auto",
    kv_cache: str | None = None,
    needle: bool = False,
) -> EvalResult:
    """Measure `artifact` (checkpoint folder, GPTQ folder or GGUF file) over the text file `data`.

    With `reference` (any of the same), divergence and agreement too. Windows hold `ctx` tokens; `max_windows`
    stops after that many. `kv_cache` is the artifact's alone (see open_provider); with `needle` retrieval at depth is
    measured too. Raises QwenQuantError when something cannot be read, the text is shorter than a
    window, or the two models do not share a tokenizer.
    """
    text = read_text(data)
    measured = open_provider(artifact, n_threads, isa, kv_cache)
    against = None if reference is None else open_provider(reference, n_threads, isa)
    tokens = tokenize((against or measured).tokenizer, text)
    if against is not None and not np.array_equal(tokens, tokenize(measured.tokenizer, text)):
        raise QwenQuantError(
            f"{measured.name} and {against.name} turn the text into different tokens; "
            "--reference must be the checkpoint that the artifact was made from"
        )
    windows = cut_windows(tokens, ctx, max_windows)
    result = evaluate_windows(measured, against, windows, data=str(data), text=text)
    result = replace(
        result,
        kv_cache=kv_cache,
        kv_bytes_per_token=measured.kv_bytes_per_token,
        kv_recent_bytes=measured.kv_recent_bytes,
    )
    if not needle:
        return result
    found = needle_retrieval(measured, windows)
    result = replace(result, retrieval=found.share, retrieval_gain=found.gain)
    if against is None:
        return result
    found = needle_retrieval(against, windows)
    return replace(result, retrieval_reference=found.share, retrieval_gain_reference=found.gain)


def evaluate_windows(
    artifact: LogitsProvider,
    reference: LogitsProvider | None,
    windows: npt.NDArray[np.int32],
    *,
    data: str = "",
    text: str = "",
) -> EvalResult:
    """Measure over token windows [n, ctx]; at most one window's logits per model are in memory.

    Each perplexity is over the model's own rows, as llama.cpp has it. Divergence is over the rows that both
    models have; where one head is padded further than the other, both distributions are cut to the shorter
    and renormalized. Raises QwenQuantError when a model cannot take the tokens, or gives no finite logits.
    """
    models = [artifact] if reference is None else [artifact, reference]
    for model in models:
        check_fits(model, windows)
    ours, theirs, divergence = Perplexity(), Perplexity(), Divergence()
    started = time.perf_counter()
    with progress("evaluating", len(windows)) as advance:
        for window in windows:
            logits = [scored_logits(model, window) for model in models]
            targets = window[first_scored(len(window)) + 1 :]
            add_window(logits, targets, (ours, theirs), divergence)
            advance(1, f"perplexity {ours.value:.3f}")
    result = EvalResult(
        artifact=artifact.name,
        ppl=ours.value,
        ppl_stderr=ours.stderr,
        tokens=ours.tokens,
        windows=len(windows),
        ctx=windows.shape[1],
        seconds=time.perf_counter() - started,
        data=data,
        data_sha256=hashlib.sha256(text.encode()).hexdigest() if text else "",
    )
    if reference is None:
        return result
    return replace(
        result,
        reference=reference.name,
        ppl_reference=theirs.value,
        ppl_reference_stderr=theirs.stderr,
        kld_mean=divergence.mean,
        kld_stderr=divergence.stderr,
        kld_median=divergence.percentile(50),
        kld_p99=divergence.percentile(99),
        kld_max=divergence.percentile(100),
        top1_agreement=divergence.top1_agreement,
    )


def check_fits(model: LogitsProvider, windows: npt.NDArray[np.int32]) -> None:
    """Raise QwenQuantError when `windows` [n, ctx] exceed the context or name ids that the model lacks."""
    if windows.shape[1] > model.max_ctx:
        raise QwenQuantError(
            f"{model.name}: windows of {windows.shape[1]} tokens exceed its context of {model.max_ctx}; "
            "give a smaller --ctx"
        )
    if int(windows.max()) >= model.n_vocab:
        raise QwenQuantError(
            f"{model.name}: the text has token id {int(windows.max())}, the model only {model.n_vocab} rows; "
            "tokenizer and weights do not belong together"
        )


def scored_logits(model: LogitsProvider, window: Tokens) -> npt.NDArray[np.float32]:
    """Logits [scored, V] of the positions that predict a scored token."""
    # The last position predicts beyond the window.
    logits = model.window_logits(window, first_scored(len(window)))[:-1]
    if not np.isfinite(logits).all():
        raise QwenQuantError(f"{model.name}: computes NaN or infinite logits; the weights are damaged")
    return logits


def add_window(
    logits: list[npt.NDArray[np.float32]],
    targets: npt.NDArray[np.int32],
    perplexities: tuple[Perplexity, Perplexity],
    divergence: Divergence,
) -> None:
    """Score one window: logits [scored, V] of the artifact and, when there is one, of the reference."""
    shared = min(found.shape[1] for found in logits)
    for rows in row_blocks(len(targets)):
        log_probs = [log_softmax(found[rows]) for found in logits]
        for perplexity, found in zip(perplexities, log_probs, strict=False):
            perplexity.add(found, targets[rows])
        if len(log_probs) == 2:
            ours, theirs = (renormalized(found, shared) for found in log_probs)
            divergence.add(theirs, ours)


def renormalized(log_probs: npt.NDArray[np.float64], shared: int) -> npt.NDArray[np.float64]:
    """Log-probabilities [T, V] cut to their first `shared` columns, summing to one again."""
    if log_probs.shape[1] == shared:
        return log_probs
    cut = log_probs[:, :shared]
    return cut - np.log(np.exp(cut).sum(axis=-1, keepdims=True))
