"""Prompt lookup: drafts as they are defined, and text that is the same with and without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qwen_quant import _core
from qwen_quant.runtime.conversation import Completion
from qwen_quant.runtime.lookup import LookupSteps, PromptLookup
from qwen_quant.runtime.sampling import SamplingParams
from qwen_quant.runtime.session import Session

TinyModels = Callable[..., Any]
MODELS = [("qwen2", "Q8_0"), ("qwen3", "Q4_0"), ("qwen3", "F16"), ("qwen2moe", "Q4_1"), ("qwen3moe", "BF16")]
TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=40)  # few ids, so that they come again
# Rows that consist of whole blocks of 256 weights.
WHOLE_BLOCKS = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 256}
SAMPLING = st.sampled_from(
    [
        SamplingParams(),
        SamplingParams(repetition_penalty=1.2),
        SamplingParams(temperature=0.7, top_k=5, seed=3),
        SamplingParams(temperature=1.3, top_p=0.9, min_p=0.02, repetition_penalty=1.1, seed=4),
    ]
)


def expected_draft(tokens: Sequence[int], length: int) -> list[int]:
    """By searching: what followed the longest of the last 4, 3 or 2 tokens where they stood before."""
    for n in (4, 3, 2):
        ends = [end for end in range(n, len(tokens)) if list(tokens[end - n : end]) == list(tokens[-n:])]
        if len(tokens) >= n and ends:
            known = list(tokens)
            for i in range(length):
                known.append(known[ends[-1] + i])
            return known[len(tokens) :]
    return []


@given(TOKENS, TOKENS, st.integers(0, 9))
def test_drafts_are_what_followed_last_time(context: list[int], more: list[int], length: int) -> None:
    lookup = PromptLookup(context, 6)
    for token in more:
        lookup.append(token)
    lookup.learn(drafted=6, accepted=6)
    assert lookup.draft(length) == expected_draft(context + more, min(length, 6))


def test_drafts_grow_while_they_are_right() -> None:
    lookup = PromptLookup([1, 2] * 10, 8)
    sizes = []
    for accepted in (1, 2, 4, 0, 1, 2):
        lookup.learn(drafted=max(accepted, 1) if accepted else 4, accepted=accepted)
        sizes.append(len(lookup.draft(100)))
    assert sizes == [2, 4, 8, 1, 2, 4]


@pytest.fixture(scope="module")
def pairs(tiny_model: TinyModels) -> list[tuple[Session, Session]]:
    """Two sessions of each model: with prompt lookup and without."""
    sessions = []
    for architecture, tensor_type in MODELS:
        path = tiny_model(architecture, tensor_type).path
        sessions.append((Session.open(path, n_threads=2), Session.open(path, n_threads=1)))
    return sessions


@given(
    model=st.integers(0, len(MODELS) - 1),
    context=st.lists(st.integers(0, 3), max_size=30),
    prompt=TOKENS,
    draft_max=st.integers(1, 12),
    max_tokens=st.integers(0, 40),
    sampling=SAMPLING,
    stop_ids=st.sets(st.integers(0, 95), max_size=3),
    taken=st.integers(0, 50),
)
@example(1, [], [1, 2, 3, 1, 2, 3, 1, 2], 8, 40, SamplingParams(), set(), 50)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_text_and_context_do_not_change(
    pairs: list[tuple[Session, Session]],
    model: int,
    context: list[int],
    prompt: list[int],
    draft_max: int,
    max_tokens: int,
    sampling: SamplingParams,
    stop_ids: set[int],
    taken: int,
) -> None:
    """Whatever is generated, and wherever the caller breaks off."""
    outcomes = []
    for session, length in zip(pairs[model], (draft_max, 0), strict=True):
        session.reset()
        session.draft_max = length
        if context:
            session.prefill(context)
        with closing(session.generate(prompt, max_tokens, sampling, stop_ids)) as tokens:
            text = [token for _, token in zip(range(taken), tokens, strict=False)]
        outcomes.append((text, list(session.tokens), session.n_past, session.step(7).tobytes()))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("isa", _core.cpu_isas())
@pytest.mark.parametrize("tensor_type", _core.matmul_types())
def test_logits_do_not_depend_on_the_batch(tiny_model: TinyModels, tensor_type: str, isa: str) -> None:
    """To the last bit, on every instruction set, at any depth: what exact drafts rest on."""
    wide = WHOLE_BLOCKS if tensor_type.endswith("_K") or tensor_type == "IQ4_XS" else {}
    ids = np.random.default_rng(1).integers(0, 96, 300)
    for architecture, depth in (("qwen3", 30 if isa == "scalar" else 280), ("qwen3moe", 20)):
        try:
            path = tiny_model(architecture, tensor_type, **wide).path
        except NotImplementedError:
            pytest.skip(f"the gguf package cannot write {tensor_type}")
        session = Session.open(path, isa=isa, n_threads=2)
        session.prefill(ids[:depth])
        singly = np.stack([session.step(token) for token in ids[depth : depth + 17].tolist()])
        for size in (2, 3, 5, 9, 17):
            session.truncate(depth)
            together = session.extend(ids[depth : depth + size])
            np.testing.assert_array_equal(together, singly[:size])


class Round:
    """Stands for a session whose model says 0, 1, 2, 3, 4 round and round."""

    n_ctx = 1000

    def __init__(self) -> None:
        self.tokens: list[int] = [0, 1]
        self.batches: list[int] = []

    @property
    def n_past(self) -> int:
        return len(self.tokens)

    def truncate(self, n_tokens: int) -> None:
        del self.tokens[n_tokens:]

    def extend(self, ids: list[int]) -> np.ndarray:
        self.tokens += ids
        self.batches.append(len(ids))
        return np.eye(5, dtype=np.float32)[[(token + 1) % 5 for token in ids]]


def test_repeated_text_takes_fewer_steps() -> None:
    session = Round()
    steps = LookupSteps(session, 8)  # type: ignore[arg-type]
    token = 2
    for left in range(49, -1, -1):
        following = int(steps.step(token, left).argmax())
        assert following == (token + 1) % 5
        token = following
    steps.close()
    assert session.tokens == [i % 5 for i in range(52)]
    # The seventh token has been there before, after the same one; a draft ends where nothing more is wanted.
    assert session.batches == [1] * 4 + [3, 5] + [9] * 4 + [2]
    assert steps.drafted == steps.accepted == 39


def test_a_full_context_ends_as_it_would(tiny_model: TinyModels) -> None:
    path = tiny_model("qwen3", "Q4_0").path
    texts = []
    for draft_max in (8, 0):
        session = Session.open(path, n_ctx=64)
        session.draft_max = draft_max
        completion = Completion(session, [5, 6, 7, 8] * 6)
        for _ in session.generate([5, 6, 7, 8] * 6, 40):
            pass
        texts.append((list(session.tokens), completion.stop))
        assert session.n_past == 63
    assert texts[0] == texts[1]
