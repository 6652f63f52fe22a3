"""Every block type on the engine, alone and mixed as llama.cpp mixes them, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qwen_quant import _core
from qwen_quant.grids.gguf import GRIDS
from qwen_quant.runtime.session import Session

TinyModels = Callable[..., Any]
TOKENS = np.random.default_rng(3).integers(0, 96, 70).astype(np.int32)
# Rows that are whole blocks of 256.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
WIDE_EXPERTS = {"moe_intermediate_size": 256, "num_experts": 5}
# What llama.cpp's quantizer makes of a model as Q4_K_M, and where rows are no multiple of 256 as Q4_K_M and Q3_K_S.
MIXES: dict[str, dict[str, Any]] = {
    "Q4_K_M": {"types": {"attn_v": "Q6_K", "blk.0.ffn_down": "Q6_K", "token_embd": "Q6_K"}, **WIDE},
    "Q5_0 for Q4_K": {
        "types": {"attn_v": "Q8_0", "attn_output": "Q5_1", "ffn_down": "Q8_0", "token_embd": "Q8_0", "": "Q5_0"},
    },
    "IQ4_NL for Q3_K": {"types": {"attn_k": "F16", "token_embd": "Q8_0", "": "IQ4_NL"}},
    "each its own": {
        "types": {
            "attn_q": "Q2_K", "attn_k": "IQ4_XS", "attn_v": "Q5_K", "attn_output": "Q3_K", "ffn_gate": "Q5_1",
            "ffn_up": "Q4_K", "ffn_down": "Q6_K", "token_embd": "Q5_K", "output.": "Q6_K",
        },
        "tied": False,
        **WIDE,
    },
}  # fmt: skip


def kld(reference: np.ndarray, logits: np.ndarray) -> float:
    """Mean over tokens of KL(softmax(reference) || softmax(logits)), both [T, V]."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        shifted = x - x.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    p, q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize("isa", _core.cpu_isas())
@pytest.mark.parametrize("tensor_type", GRIDS)
def test_logits_equal_transformers(tiny_model: TinyModels, tensor_type: str, isa: str) -> None:
    """Embedding and tied head of the type too; what int8 activations cost."""
    model = tiny_model("qwen3", tensor_type, **WIDE)
    logits = Session.open(model.path, isa=isa, n_threads=2).logits(TOKENS)
    assert kld(model.reference_logits(TOKENS), logits) < 1e-3


@pytest.mark.parametrize("isa", _core.cpu_isas())
@pytest.mark.parametrize("mix", MIXES)
def test_mixed_types(tiny_model: TinyModels, mix: str, isa: str) -> None:
    model = tiny_model("qwen3", "Q4_K", **MIXES[mix])
    logits = Session.open(model.path, isa=isa, n_threads=2).logits(TOKENS)
    assert kld(model.reference_logits(TOKENS), logits) < 1e-3


@pytest.mark.parametrize("isa", _core.cpu_isas())
@pytest.mark.parametrize(
    "tensor_type", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q5_0", "Q5_1"]
)
def test_experts(tiny_model: TinyModels, tensor_type: str, isa: str) -> None:
    """The down projections are of another type than what feeds them."""
    types = {"ffn_down_exps": "Q6_K"}
    model = tiny_model("qwen3moe", tensor_type, types=types, **WIDE, **WIDE_EXPERTS)
    gaps = np.abs(
        Session.open(model.path, isa=isa, n_threads=2).logits(TOKENS) - model.reference_logits(TOKENS)
    )
    # As in test_experts.py: now and then int8 activations lead to another expert.
    assert np.median(gaps) < 0.08
    assert np.quantile(gaps.max(axis=1), 0.9) < 0.5


@pytest.mark.parametrize("isa", _core.cpu_isas())
@pytest.mark.parametrize("mix", MIXES)
def test_steps_threads_and_chunks_change_nothing(tiny_model: TinyModels, mix: str, isa: str) -> None:
    path = tiny_model("qwen3", "Q4_K", **MIXES[mix]).path
    expected = Session.open(path, isa=isa, n_threads=1).logits(TOKENS)
    other = Session.open(path, isa=isa, n_threads=3)
    np.testing.assert_array_equal(other.prefill(TOKENS[:40]), expected[39])
    for position in range(40, 60):
        np.testing.assert_array_equal(other.step(int(TOKENS[position])), expected[position])
