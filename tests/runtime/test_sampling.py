"""Sampling: each filter against its definition, and draws against their probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_quant.errors import UsageError
from qwen_quant.runtime.sampling import Sampler, SamplingParams

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))


def frequencies(params: SamplingParams, history: tuple[int, ...] = (), n: int = 4000) -> np.ndarray:
    sampler = Sampler(params)
    draws = [sampler.sample(LOGITS, history) for _ in range(n)]
    return np.bincount(draws, minlength=5) / n


def check(params: SamplingParams, expected: list[float]) -> None:
    observed = frequencies(params)
    wanted = np.array(expected) / np.sum(expected)
    assert (observed[wanted == 0] == 0).all()
    np.testing.assert_allclose(observed, wanted, atol=0.035)


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert Sampler(SamplingParams()).sample(np.array([1, 5, 5, 2], np.float32)) == 1


def test_temperature() -> None:
    check(SamplingParams(temperature=1.0, seed=1), [0.1, 0.4, 0.05, 0.3, 0.15])
    check(SamplingParams(temperature=0.5, seed=1), [0.01, 0.16, 0.0025, 0.09, 0.0225])


def test_top_k() -> None:
    check(SamplingParams(temperature=1.0, top_k=2, seed=1), [0, 0.4, 0, 0.3, 0])
    check(SamplingParams(temperature=1.0, top_k=99, seed=1), [0.1, 0.4, 0.05, 0.3, 0.15])


def test_top_p_keeps_the_token_that_crosses_the_mass() -> None:
    check(SamplingParams(temperature=1.0, top_p=0.6, seed=1), [0, 0.4, 0, 0.3, 0])
    check(SamplingParams(temperature=1.0, top_p=0.8, seed=1), [0, 0.4, 0, 0.3, 0.15])
    check(SamplingParams(temperature=1.0, top_p=1e-9, seed=1), [0, 1, 0, 0, 0])


def test_min_p() -> None:
    check(SamplingParams(temperature=1.0, min_p=0.3, seed=1), [0, 0.4, 0, 0.3, 0.15])


def test_filters_come_before_temperature() -> None:
    check(SamplingParams(temperature=2.0, min_p=0.3, seed=1), [0, 0.4**0.5, 0, 0.3**0.5, 0.15**0.5])


def test_equal_logits_at_the_edge_of_top_k() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=2, seed=0))
    assert {sampler.sample(np.zeros(6, np.float32)) for _ in range(50)} == {0, 1}


def plain_choice(logits: np.ndarray, params: SamplingParams, history: list[int], draw: float) -> int:
    """The definition, over the whole vocabulary sorted."""
    logits = logits.copy()
    for token in set(history):
        factor = np.float32(params.repetition_penalty)
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    order = np.argsort(-logits, kind="stable") if params.top_k or params.top_p < 1 else np.arange(logits.size)
    order = order[: params.top_k or None]
    if params.top_p < 1:
        weights = np.exp(logits[order].astype(np.float64) - logits.max())
        order = order[: int(np.searchsorted(np.cumsum(weights / weights.sum()), params.top_p)) + 1]
    order = order[logits[order] >= logits.max() + np.log(params.min_p)] if params.min_p else order
    scaled = logits[order] / params.temperature
    weights = np.exp(scaled.astype(np.float64) - scaled.max())
    above = np.flatnonzero(np.cumsum(weights / weights.sum()) > draw)
    return int(order[above[0] if above.size else -1])


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n_vocab=st.sampled_from([3, 64, 127, 700, 5000, 20_000]),
    spread=st.sampled_from([0.01, 1.0, 4.0, 12.0]),
    rounded=st.booleans(),
    top_k=st.sampled_from([0, 0, 1, 7, 40, 3000]),
    top_p=st.sampled_from([1.0, 1e-9, 0.5, 0.95, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.7]),
    penalty=st.sampled_from([1.0, 1.3]),
)
def test_shortcuts_choose_what_the_definition_chooses(
    seed: int,
    n_vocab: int,
    spread: float,
    rounded: bool,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
) -> None:
    random = np.random.default_rng(seed)
    logits = (random.standard_normal(n_vocab) * spread).astype(np.float32)
    logits = np.round(logits) if rounded else logits
    history = random.integers(0, n_vocab, 20).tolist()
    params = SamplingParams(0.8, top_k, top_p, min_p, penalty, seed)
    sampler, draws = Sampler(params), np.random.default_rng(seed)
    for _ in range(3):
        assert sampler.sample(logits, history) == plain_choice(logits, params, history, draws.random())


def test_repetition_penalty() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0))
    logits = np.array([3.0, 2.0, -1.0], np.float32)
    assert sampler.sample(logits, [0, 0]) == 1  # 3 / 2 < 2, and once is enough
    assert sampler.sample(np.array([-2.0, -1.5, -3.0], np.float32), [1]) == 0  # -1.5 * 2 < -2
    assert logits[0] == 3.0


def test_seeds() -> None:
    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=3.0, seed=seed))
        return [sampler.sample(LOGITS) for _ in range(64)]

    assert draws(5) == draws(5) != draws(6)
    assert draws(None) != draws(None)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1},
     {"min_p": -0.1}, {"repetition_penalty": 0}, {"seed": -1}],
)  # fmt: skip
def test_values_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingParams(**wrong)  # type: ignore[arg-type]
