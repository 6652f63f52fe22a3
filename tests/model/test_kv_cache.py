"""The reference model's quantized cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.grids.kv import ChannelGroups, Half, TokenGroups
from qwen_quant.grids.kv_layout import KVCacheSpec, KVLayer, KVLayout, uncalibrated
from qwen_quant.model import load_model
from qwen_quant.model.cache import split_at_stretches
from qwen_quant.model.kv_cache import QuantizedKVCache, new_quantized_cache

TABLE = (torch.ones(1, 64), torch.zeros(1, 64))


def vectors(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(seed).standard_normal((1, 2, tokens, 64)).astype(np.float32)
    )


def cache_of(layout: KVLayout, residual: int = 0) -> QuantizedKVCache:
    return QuantizedKVCache(KVLayer(layout, layout), residual, torch.device("cpu"))


def test_pieces_are_stored_as_the_whole() -> None:
    x = vectors(50)
    whole = cache_of(KVLayout(TokenGroups(4), hadamard=True)).append(x, x, TABLE)
    pieces = cache_of(KVLayout(TokenGroups(4), hadamard=True))
    for part in x.split(7, dim=2):
        keys, values = pieces.append(part, part, TABLE)
    assert torch.equal(keys, whole[0])
    assert torch.equal(values, whole[1])
    assert pieces.length == 50


@pytest.mark.parametrize("pieces", [[50], [9, 1, 30, 10], [1] * 50], ids=["whole", "parts", "single"])
def test_a_token_sees_its_own_stretch_as_it_is(pieces: list[int]) -> None:
    x, layout = vectors(50), KVLayout(TokenGroups(4))
    stored, half = layout.decode(layout.encode(x, None), None), x.half().float()
    cache = cache_of(layout, residual=8)
    for part in x.split(pieces, dim=2):
        for piece in split_at_stretches(part, [cache], dim=2):
            keys, values = cache.append(piece, piece, TABLE)
            begin = (cache.length - 1) // 8 * 8
            assert torch.equal(keys[:, :, :begin], stored[:, :, :begin])
            assert torch.equal(keys[:, :, begin:], half[:, :, begin : cache.length])
    assert torch.equal(values, keys)
    assert cache.length == 50


def test_groups_of_tokens_wait_until_they_are_whole() -> None:
    x = vectors(50)
    keys, _ = cache_of(KVLayout(ChannelGroups(4))).append(x, x, TABLE)
    assert torch.equal(keys[:, :, 32:], x[:, :, 32:].half().float())
    gap = (keys - x)[:, :, :32].abs().amax(2)
    extent = x[:, :, :32].amax(2) - x[:, :, :32].amin(2)
    assert bool((gap <= 0.51 * extent / 15 + 1e-2).all())


def test_a_centre_is_turned_with_its_keys(make_checkpoint: Callable[..., Path]) -> None:
    """With the whole bias as centre even a bias of thousands leaves the logits alone."""
    changes = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "head_dim": None,
        "hidden_size": 128,
    }
    model = load_model(Checkpoint(make_checkpoint(**changes)))
    biases = []
    for layer in model.model.layers:
        bias = layer.self_attn.k_proj.bias
        bias.mul_(300)
        layer.self_attn.q_proj.weight.mul_(0.01)
        layer.self_attn.q_proj.bias.mul_(0.01)
        biases.append(bias.view(2, 32).numpy())
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        exact = model(tokens)

        def error(spec: KVCacheSpec) -> float:
            return float((model(tokens, new_quantized_cache(spec)) - exact).abs().max())

        values = KVLayout(Half())
        with_bias = KVLayer(KVLayout(TokenGroups(8)), values)
        without = (KVLayer(KVLayout(TokenGroups(8), bias), values) for bias in biases)
        assert error(KVCacheSpec("centred", tuple(without))) < 0.2 * error(
            KVCacheSpec("naive", (with_bias,) * 2)
        )


def test_qwen1_keeps_its_rotary_base(make_qwen1: Callable[..., Path]) -> None:
    model = load_model(Checkpoint(make_qwen1()))
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        caches = new_quantized_cache(uncalibrated("f16", [None, None]))
        assert (model(tokens, caches) - model(tokens)).abs().max() < 1e-2
        assert caches[0].prompt == 40
