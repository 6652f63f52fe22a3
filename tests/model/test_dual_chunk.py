"""Dual chunk attention against transformers' models whose attention is replaced by the paper's definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.dual_chunk import DualChunk
from qwen_quant.model import Model, dual_chunk, load_model

Oracle = Callable[..., Any]  # the fixture that builds a transformers model
TOLERANCE = 1e-4
THETA = 1e4
CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 37,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
}


def distance(i: int, j: int, chunk_size: int, local_size: int) -> int:
    """How far apart the query at i and the key at j <= i are made to be (section 3 of the paper)."""
    s = chunk_size - local_size
    apart = i // s - j // s
    if apart == 0:
        return i - j
    if apart == 1:
        return min(i % s + s, chunk_size) - j % s
    return min(s - 1 + s, chunk_size) - j % s


def naive_attention(setting: dict[str, int]) -> Callable[..., tuple[torch.Tensor, None]]:
    """Attention with a rotation for each pair of tokens, in place of transformers' `forward`."""

    def forward(self: nn.Module, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        batch, length, _ = hidden_states.shape
        shape = (batch, length, -1, self.head_dim)
        queries, keys = self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states).view(shape)
        values = self.v_proj(hidden_states).view(shape).double()
        if isinstance(self, Qwen3Attention):
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        repeated = queries.shape[2] // keys.shape[2]
        keys, values = keys.repeat_interleave(repeated, 2), values.repeat_interleave(repeated, 2)
        half = self.head_dim // 2
        q, k = (torch.complex(x[..., :half].double(), x[..., half:].double()) for x in (queries, keys))
        pairs = torch.tensor(
            [
                [distance(i, min(i, j), setting["chunk_size"], setting["local_size"]) for j in range(length)]
                for i in range(length)
            ]
        )
        turns = torch.polar(
            torch.ones(length, length, half).double(),
            pairs[..., None] * THETA ** (-torch.arange(half).double() / half),
        )
        scores = torch.einsum("bihf,bjhf,ijf->bhij", q, k.conj(), turns).real / self.head_dim**0.5
        original = setting.get("original_max_position_embeddings", length)
        scores *= max(1.0, 0.1 * math.log(length / original) + 1) ** 2
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        context = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), values)
        return self.o_proj(context.flatten(2).float()), None

    return forward


@pytest.fixture(scope="module")
def ours(build_oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Model]]:
    """A function that gives a transformers model and the reference model over the checkpoint it writes."""
    numbers = itertools.count()

    def make(model_type: str, setting: dict[str, int] | None) -> tuple[Any, Model]:
        extra = {} if setting is None else {"dual_chunk_attention_config": setting}
        oracle = build_oracle({"model_type": model_type, **CONFIG, **extra})
        folder: Path = tmp_path_factory.mktemp(f"model{next(numbers)}")
        oracle.save_pretrained(folder)
        return oracle, load_model(Checkpoint(folder))

    return make


def random_tokens(length: int) -> torch.Tensor:
    return torch.randint(37, (2, length), generator=torch.Generator().manual_seed(length))


@st.composite
def chunk_settings(draw: st.DrawFn) -> dict[str, int]:
    chunk_size = draw(st.integers(2, 24))
    setting = {"chunk_size": chunk_size, "local_size": draw(st.integers(1, chunk_size - 1))}
    if draw(st.booleans()):
        setting["original_max_position_embeddings"] = draw(st.sampled_from([3, 20, 100]))
    return setting


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    model_type=st.sampled_from(["qwen2", "qwen3"]),
    setting=chunk_settings(),
    length=st.integers(1, 60),
    scores=st.sampled_from([1, 2 * 4 * 60 * 5, dual_chunk.SCORES]),
)
def test_logits_equal_the_papers_definition(
    ours: Callable[..., tuple[Any, Model]],
    model_type: str,
    setting: dict[str, int],
    length: int,
    scores: int,
) -> None:
    oracle, model = ours(model_type, setting)
    tokens = random_tokens(length)
    attention = Qwen2Attention if model_type == "qwen2" else Qwen3Attention
    with (
        torch.no_grad(),
        mock.patch.object(attention, "forward", naive_attention(setting)),
        mock.patch.object(dual_chunk, "SCORES", scores),
    ):
        assert (model(tokens) - oracle(tokens).logits).abs().max() < TOLERANCE


SHORT = {"chunk_size": 16, "local_size": 4}
SETTINGS = [
    SHORT,
    {**SHORT, "original_max_position_embeddings": 16},
    {**SHORT, "original_max_position_embeddings": 9},
    {"chunk_size": 16, "local_size": 13},
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_plain_attention_is_the_same_up_to_exact_length_and_no_farther(
    ours: Callable[..., tuple[Any, Model]], model_type: str, setting: dict[str, int]
) -> None:
    oracle, model = ours(model_type, setting)
    exact = DualChunk(**setting).exact_length
    for length in (1, exact - 1, exact, exact + 1):
        tokens = random_tokens(length)
        with torch.no_grad():
            difference = (model(tokens) - oracle(tokens).logits).abs().max()
        assert (difference < TOLERANCE) == (length <= exact)


def cuts(length: int) -> Iterator[list[int]]:
    yield [*range(length + 1)]
    yield [0, 5, 11, 12, 13, 30, length]
    yield [0, 1, length]


@pytest.mark.parametrize("edges", cuts(41), ids=["steps", "pieces", "rest"])
def test_pieces_on_a_cache_equal_the_whole(ours: Callable[..., tuple[Any, Model]], edges: list[int]) -> None:
    _, model = ours("qwen2", SHORT)
    tokens, caches = random_tokens(41), model.new_cache()
    with torch.no_grad():
        parts = [model(tokens[:, a:b], caches) for a, b in itertools.pairwise(edges)]
        assert (torch.cat(parts, dim=1) - model(tokens)).abs().max() < TOLERANCE
