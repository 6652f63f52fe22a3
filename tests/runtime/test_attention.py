"""Attention over a context that several threads divide: the same to the last bit, and work for each of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_quant import _core

TinyModels = Callable[..., Any]
CHUNK = 256
IDS = np.random.default_rng(0).integers(0, 96, 1200).astype(np.int32)


def engine(model: Any, n_threads: int, cache: str = "f16", isa: str = "auto") -> _core.Engine:
    return _core.Engine(
        str(model.path), n_threads=n_threads, isa=isa, n_ctx=1200, cache_type_k=cache, cache_type_v=cache
    )


@pytest.mark.parametrize("cache", ["f16", "int8", "int4"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_threads_change_nothing_at_depth(tiny_model: TinyModels, family: str, cache: str) -> None:
    """Steps of one and of several tokens, before, at and after the boundaries of chunks."""
    model = tiny_model(family, "Q8_0", **({"head_dim": 64} if family == "qwen3" else {"hidden_size": 256}))
    engines = [engine(model, n, cache) for n in (1, 2, 3, 5)]
    for depth in (252, 508, 1021):
        found = []
        for e in engines:
            steps = [e.forward(IDS[:depth], 0)]
            steps += [e.forward(IDS[i : i + 1], i) for i in range(depth, depth + 6)]
            steps.append(e.forward(IDS[depth + 6 : depth + 25], depth + 6, 19))
            found.append(np.concatenate(steps))
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0])
        whole = engines[3].forward(IDS[: depth + 25], 0, 25)
        np.testing.assert_array_equal(whole, found[0][-25:])


def test_sequences_of_different_depths(tiny_model: TinyModels) -> None:
    """Side by side with few heads: each as if it ran alone on one thread."""
    model = tiny_model("qwen3", "Q4_0")
    several, alone = engine(model, 5), engine(model, 1)
    several.forward(IDS[:250], 0)
    several.fork(3)
    texts = [IDS[250:256], IDS[300:601], IDS[700:701]]
    found = several.forward_sequences([0, 1, 2], texts, 1)
    for sequence, text in enumerate(texts):
        alone.forward(IDS[:250], 0)
        np.testing.assert_array_equal(found[sequence], alone.forward(text, 250))


@pytest.mark.parametrize("isa", _core.cpu_isas())
def test_a_divided_context_as_transformers_sees_it(tiny_model: TinyModels, isa: str) -> None:
    model = tiny_model("qwen2", "F16", max_position_embeddings=1200)
    n = 300 if isa == "scalar" else 1100
    expected = model.reference_logits(IDS[: n + 4])
    divided = engine(model, 5, isa=isa)
    divided.forward(IDS[:n], 0)
    for i in range(n, n + 4):
        found = divided.forward(IDS[i : i + 1], i)[0]
        assert np.abs(found - expected[i]).max() < 2e-4 * np.abs(expected[i]).max()


@given(
    parts=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 60)), min_size=1, max_size=4),
    n_kv_heads=st.integers(1, 9),
    n_threads=st.integers(1, 20),
)
def test_each_position_is_attended_to_once(
    parts: list[tuple[int, int]], n_kv_heads: int, n_threads: int
) -> None:
    seen = set()
    work = _core.attention_work(parts, n_kv_heads, n_threads)
    for (part, t0, t1, head), units in groupby(work, lambda unit: unit[:4]):
        ends = [(begin, end) for *_, begin, end in units]
        first = parts[part][0]
        assert (ends[0][0], ends[-1][1]) == (0, first + t1)
        assert all(a[1] == b[0] and b[0] % CHUNK == 0 for a, b in pairwise(ends))
        assert all(end - begin <= CHUNK for begin, end in ends) or len(ends) == 1
        assert (first + t0) // 4 == (first + t1 - 1) // 4  # tokens of a group read the same ones in FP16
        for t in range(t0, t1):
            assert (part, t, head) not in seen
            seen.add((part, t, head))
    assert len(seen) == sum(n for _, n in parts) * n_kv_heads


@pytest.mark.parametrize("n_threads", [2, 4, 8, 16])
def test_a_step_at_depth_is_work_for_all(n_threads: int) -> None:
    """Two key/value heads: what each thread begins with, in positions, is within a chunk of the even share."""
    work = _core.attention_work([(4096, 1)], 2, n_threads)
    shares = [work[len(work) * i // n_threads : len(work) * (i + 1) // n_threads] for i in range(n_threads)]
    positions = [sum(end - begin for *_, begin, end in share) for share in shares]
    assert sum(positions) == 2 * 4097
    assert max(positions) <= 2 * 4097 / n_threads + CHUNK
    assert min(positions) >= 2 * 4097 / n_threads - CHUNK


def test_what_is_work_for_all_is_not_divided() -> None:
    assert len(_core.attention_work([(4096, 1)], 2, 1)) == 2  # one thread
    assert len(_core.attention_work([(4096, 1)], 8, 2)) == 8  # enough heads
    assert len(_core.attention_work([(255, 1)], 2, 16)) == 2  # a single chunk
    prompt = _core.attention_work([(4096, 256)], 2, 16)
    assert len(prompt) == 2 * 64
    costs = [sum(end for *_, end in prompt[i : i + 8]) for i in range(0, 128, 8)]
    assert max(costs) - min(costs) <= 16  # later tokens see more: every stretch has the same mix
