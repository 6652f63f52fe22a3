"""Several sequences in one step: each as if it ran alone, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_quant import _core
from qwen_quant.errors import QwenQuantError
from qwen_quant.runtime.samples import generate_samples, sample_parameters
from qwen_quant.runtime.sampling import SamplingParams
from qwen_quant.runtime.session import Session

TinyModels = Callable[..., Any]
MODELS = [
    ("qwen2", "Q8_0", "f16"),
    ("qwen3", "Q4_0", "f16"),
    ("qwen3", "F16", "f16"),
    ("qwen3", "Q4_1", "int8"),
    ("qwen3", "Q8_0", "int4"),
    ("qwen2moe", "Q4_1", "f16"),
    ("qwen3moe", "BF16", "f16"),
]
SAMPLING = SamplingParams(temperature=1.3, top_k=20, top_p=0.95, repetition_penalty=1.1, seed=7)


def ids(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, n).astype(np.int32)


@pytest.fixture(scope="module")
def pairs(tiny_model: TinyModels) -> list[tuple[_core.Engine, Session]]:
    """Of each model an engine for several sequences and a session that runs one after the other."""
    found = []
    for architecture, tensor_type, cache in MODELS:
        wide = {} if cache == "f16" else {"head_dim": 64}
        path = str(tiny_model(architecture, tensor_type, **wide).path)
        engine = _core.Engine(path, n_threads=3, cache_type_k=cache, cache_type_v=cache)
        found.append((engine, Session.open(path, n_threads=1, cache_type_k=cache, cache_type_v=cache)))
    return found


@given(
    model=st.integers(0, len(MODELS) - 1),
    n_prefix=st.integers(0, 150),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=5),
    n_steps=st.integers(0, 2),
    n_logits=st.integers(1, 3),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_sequence_is_as_if_alone(
    pairs: list[tuple[_core.Engine, Session]],
    model: int,
    n_prefix: int,
    lengths: Sequence[int],
    n_steps: int,
    n_logits: int,
) -> None:
    engine, alone = pairs[model]
    n_logits = min(n_logits, *lengths)
    prefix = ids(n_prefix, 0)
    texts = [ids(n, seed) for seed, n in enumerate(lengths, start=1)]
    engine.fork(1)
    engine.reset()
    if n_prefix:
        engine.forward(prefix, 0)
    engine.fork(len(texts))
    order = np.random.default_rng(n_prefix).permutation(len(texts)).tolist()
    found = engine.forward_sequences(order, [texts[i] for i in order], n_logits)
    assert found.shape == (len(texts), n_logits, engine.n_vocab)
    for row, i in enumerate(order):
        expected = alone.logits([*prefix, *texts[i]])[-n_logits:]
        np.testing.assert_array_equal(found[row], expected)
    for step in range(n_steps):  # of some of them, one token each
        some = order[step:]
        if some:
            next_tokens = {i: ids(1, 100 * step + i) for i in some}
            texts = [np.concatenate((text, next_tokens.get(i, text[:0]))) for i, text in enumerate(texts)]
            found = engine.forward_sequences(some, list(next_tokens.values()))
            for row, i in enumerate(some):
                np.testing.assert_array_equal(found[row, 0], alone.logits([*prefix, *texts[i]])[-1])


def test_what_sequences_share_is_stored_once(tiny_model: TinyModels) -> None:
    engine = _core.Engine(str(tiny_model("qwen3", "Q4_0").path), n_ctx=1000)
    engine.forward(ids(700, 0), 0)
    before = engine.kv_bytes
    engine.fork(8)
    assert (engine.n_sequences, engine.kv_bytes) == (8, before)
    engine.forward_sequences(list(range(8)), [ids(1, i) for i in range(8)])
    pages = before / engine.kv_bytes_per_token
    assert engine.kv_bytes - before < 8 * before * 256 / pages  # a page each, of at most 256 tokens
    engine.fork(1)
    assert engine.kv_bytes == before
    np.testing.assert_array_equal(engine.forward(ids(3, 1), 700), engine.forward(ids(3, 1), 700))


def test_requests_that_make_no_sense(tiny_model: TinyModels) -> None:
    engine = _core.Engine(str(tiny_model("qwen2", "Q4_0").path), n_ctx=20)
    engine.fork(2)
    token = ids(1, 0)
    with pytest.raises(QwenQuantError, match="sequence 2 does not exist"):
        engine.forward_sequences([0, 2], [token, token])
    with pytest.raises(QwenQuantError, match="named twice"):
        engine.forward_sequences([1, 1], [token, token])
    with pytest.raises(QwenQuantError, match="1 sequences were named for 2"):
        engine.forward_sequences([1], [token, token])
    with pytest.raises(QwenQuantError, match="logits of 2 of 1"):
        engine.forward_sequences([1], [token], 2)
    with pytest.raises(QwenQuantError, match="21 tokens exceed the context of 20"):
        engine.forward_sequences([0, 1], [token, ids(21, 0)])
    with pytest.raises(QwenQuantError, match="0 sequences"):
        engine.fork(0)
    assert engine.n_past == 0


def test_samples_are_those_of_single_runs(tiny_model: TinyModels) -> None:
    path = tiny_model("qwen3", "Q4_0").path
    session, single = Session.open(path, n_threads=2), Session.open(path, n_threads=1)
    prompt = ids(40, 0).tolist()
    expected = []
    for i in range(3):
        single.reset()
        expected.append(list(single.generate(prompt, 30, sample_parameters(SAMPLING, i), stop_ids={3, 5})))
    found: list[list[int]] = [[], [], []]
    for index, token in generate_samples(session, prompt, 3, 30, SAMPLING, stop_ids={3, 5}):
        found[index].append(token)
    assert found == expected
    assert len({tuple(tokens) for tokens in found}) == 3
    assert (list(session.tokens), session.n_past) == (prompt, len(prompt))
    assert session.native("").n_sequences == 1
    # What breaks off leaves the prompt as well, and another request goes on from it.
    steps = generate_samples(session, [1], 2, 30, SAMPLING)
    next(steps)
    steps.close()
    assert list(session.tokens) == [*prompt, 1]
    single.reset()
    np.testing.assert_array_equal(session.step(2), single.prefill([*prompt, 1, 2]))


def test_logits_from_a_position_on(tiny_model: TinyModels) -> None:
    session = Session.open(tiny_model("qwen3", "Q8_0").path, n_ctx=600)
    tokens = ids(600, 0)
    whole = session.logits(tokens)
    for first in (0, 1, 255, 256, 400, 599):
        np.testing.assert_array_equal(session.logits(tokens, first), whole[first:])
