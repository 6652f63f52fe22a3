"""Qwen (1) gives the logits of transformers' Qwen2 over renamed weights within its context, and its own beyond."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.model import load_model

OUTER = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
LAYER = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def oracle(checkpoint: Checkpoint, rope_theta: float) -> Qwen2ForCausalLM:
    """transformers' Qwen2 with the checkpoint's weights under its own names."""
    spec, weights = checkpoint.spec, {}
    for info in spec.tensors():
        value = torch.from_numpy(checkpoint.read(info.name))
        module, _, kind = info.name.rpartition(".")
        if info.layer < 0:
            weights[f"{OUTER[module]}.{kind}"] = value
            continue
        prefix, module = f"model.layers.{info.layer}", module.split(f".{info.layer}.")[1]
        if module == "attn.c_attn":
            for name, part in zip("qkv", value.chunk(3), strict=True):
                weights[f"{prefix}.self_attn.{name}_proj.{kind}"] = part
        else:
            weights[f"{prefix}.{LAYER[module]}.{kind}"] = value
    config = Qwen2Config(
        vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_hidden_layers, num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_attention_heads, rms_norm_eps=spec.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta}, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize(("length", "alpha"), [(9, 1), (16, 1), (17, 3), (32, 3), (33, 7), (70, 15)])
def test_logits_equal_qwen2_with_the_stretched_base(
    make_qwen1: Callable[..., Path], length: int, alpha: int
) -> None:
    checkpoint = Checkpoint(make_qwen1(seq_length=16, use_logn_attn=False))
    tokens = torch.randint(4000, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        expected = oracle(checkpoint, 10000.0 * alpha ** (16 / 14))(tokens).logits
        assert (load_model(checkpoint)(tokens) - expected).abs().max() < 1e-4


def test_chunks_within_the_context_equal_the_whole(make_qwen1: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(make_qwen1(seq_length=16, use_dynamic_ntk=False))
    model, tokens = load_model(checkpoint), torch.arange(40)[None]
    caches = model.new_cache()
    with torch.no_grad():
        parts = [model(tokens[:, :7], caches), model(tokens[:, 7:30], caches), model(tokens[:, 30:], caches)]
        assert (torch.cat(parts, 1) - model(tokens)).abs().max() < 1e-4


def test_queries_beyond_the_context_grow_with_the_logarithm(make_qwen1: Callable[..., Path]) -> None:
    from qwen_quant.model.qwen1 import query_scales

    qwen1 = Checkpoint(make_qwen1(seq_length=16)).spec.qwen1
    assert qwen1 is not None
    expected = [max(1.0, math.log(p, 16)) for p in range(11, 41)]
    found = query_scales(qwen1, 10, 30, torch.device("cpu"))
    assert torch.allclose(found, torch.tensor(expected))
