"""Several answers to one prompt: it is read once, and every step computes the next tokens of all of them."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from qwen_quant.runtime.sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from qwen_quant.runtime.session import Session

OPTION = "--samples"


@dataclass
class Sample:
    """One answer: its ids, their text, and why it ended (`end_of_turn`, `length` or `context`)."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    stop: str = "end_of_turn"


def sample_parameters(sampling: SamplingParams | None, index: int) -> SamplingParams:
    """Those of the answer at `index`: a seed counts up, so that the first answer is the one without the others."""
    params = sampling or SamplingParams()
    return params if params.seed is None else replace(params, seed=params.seed + index)


def generate_samples(
    session: Session,
    prompt_tokens: Sequence[int],
    count: int,
    max_tokens: int,
    sampling: SamplingParams | None = None,
    stop_ids: Collection[int] = (),
) -> Generator[tuple[int, int], None, None]:
    """Appends the prompt, then yields (sample, token) as they are chosen: up to `max_tokens` of each of `count`
    samples, which end before one of `stop_ids`.

    The weights are read once for a step of all samples, and each gets the logits that it would get alone, to the
    last bit. Afterwards the context ends with the prompt. Raises as `Session.generate` does, and UsageError where
    another engine than the C++ one runs the file.
    """
    engine = session.native(OPTION)
    samplers = [Sampler(sample_parameters(sampling, i)) for i in range(count)]
    histories = [[*session.tokens, *prompt_tokens] for _ in range(count)]
    timings = session.begin_timings(len(prompt_tokens))
    start = time.perf_counter()
    prompt_logits = session.prefill(prompt_tokens)
    timings.pp_s = time.perf_counter() - start
    n_past, live = session.n_past, list(range(count))
    logits = [prompt_logits] * count
    engine.fork(count)
    try:
        for index in range(max_tokens):
            start = time.perf_counter()
            if index > 0:
                last = [np.array(histories[i][-1:], dtype=np.int32) for i in live]
                logits = list(engine.forward_sequences(live, last)[:, 0])
                timings.tg_tokens += len(live)
            chosen = [samplers[i].sample(row, histories[i]) for i, row in zip(live, logits, strict=True)]
            if index > 0:
                timings.tg_s += time.perf_counter() - start
            going = [(i, token) for i, token in zip(live, chosen, strict=True) if token not in stop_ids]
            for i, token in going:
                histories[i].append(token)
                yield i, token
            live = [i for i, _ in going]
            if not live:
                return
    finally:
        engine.fork(1)
        session.truncate(n_past)


def complete_samples(
    session: Session,
    prompt_tokens: Sequence[int],
    count: int,
    max_tokens: int,
    sampling: SamplingParams | None = None,
    stop_ids: Collection[int] = (),
) -> list[Sample]:
    """`count` answers to a prompt, in a context that keeps what it shares with the one before. Raises as
    `generate_samples` does."""
    rest = session.keep_shared(prompt_tokens)
    room = max(session.n_ctx - len(prompt_tokens), 0)
    limit = min(max_tokens, room)
    samples = [Sample() for _ in range(count)]
    for index, token in generate_samples(session, rest, count, limit, sampling, stop_ids):
        samples[index].tokens.append(token)
    for sample in samples:
        decoder = session.tokenizer.decoder(skip_special=True)
        sample.text = "".join(decoder.push(token) for token in sample.tokens) + decoder.finish()
        if len(sample.tokens) == limit:
            sample.stop = "length" if limit < room else "context"
    return samples
