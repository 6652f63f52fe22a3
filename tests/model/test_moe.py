"""Models with experts: transformers' logits, from both spellings of the experts' weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import CheckpointError
from qwen_quant.model import load_model
from qwen_quant.safetensors import SafetensorsFile

Oracle = Callable[..., Any]  # the fixture that builds a transformers model


@st.composite
def tiny_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Keyword arguments of a Qwen2MoeConfig or Qwen3MoeConfig, with `model_type` to choose between them."""
    kv_heads = draw(st.sampled_from([1, 2]))
    heads = kv_heads * draw(st.sampled_from([1, 3]))
    experts = draw(st.integers(1, 9))
    layers = draw(st.integers(1, 3))
    config: dict[str, Any] = {
        "model_type": draw(st.sampled_from(["qwen2_moe", "qwen3_moe"])),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * 16,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "vocab_size": 61,
        "tie_word_embeddings": draw(st.booleans()),
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "moe_intermediate_size": draw(st.sampled_from([8, 24])),
        "norm_topk_prob": draw(st.booleans()),
        "decoder_sparse_step": draw(st.integers(1, 3)),
        "mlp_only_layers": draw(st.lists(st.integers(0, layers - 1), unique=True)),
        "use_sliding_window": draw(st.booleans()),
        "sliding_window": draw(st.integers(1, 12)),
    }
    if config["model_type"] == "qwen2_moe":
        config["shared_expert_intermediate_size"] = draw(st.sampled_from([8, 56]))
        config["qkv_bias"] = draw(st.booleans())
        config["max_window_layers"] = draw(st.integers(0, 3))
    else:
        config["head_dim"] = draw(st.sampled_from([8, 32]))
        config["attention_bias"] = draw(st.booleans())
    return config


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=tiny_configs(), fused=st.booleans(), seed=st.integers(0, 1000))
def test_logits_equal_transformers(
    build_oracle: Oracle, config: dict[str, Any], fused: bool, seed: int
) -> None:
    oracle = build_oracle(config, seed=seed)
    tokens = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as folder:
        oracle.save_pretrained(folder, save_original_format=not fused)
        checkpoint = Checkpoint(Path(folder))
        assert set(checkpoint.source.names()) == {info.name for info in checkpoint.spec.tensors()}
        model = load_model(checkpoint)
    caches = model.new_cache()
    with torch.no_grad():
        expected = oracle(tokens).logits
        assert (model(tokens) - expected).abs().max() < 1e-4
        chunks = [model(tokens[:, :7], caches), model(tokens[:, 7:], caches)]
    assert (torch.cat(chunks, dim=1) - expected).abs().max() < 1e-4


CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 61,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


def test_both_spellings_give_the_same_weights(build_oracle: Oracle, tmp_path: Path) -> None:
    oracle = build_oracle(CONFIG).to(torch.bfloat16)
    oracle.save_pretrained(tmp_path / "fused", save_original_format=False, max_shard_size="20KB")
    oracle.save_pretrained(tmp_path / "single")
    stored = [n for f in (tmp_path / "fused").glob("*.safetensors") for n in SafetensorsFile(f).entries]
    assert "model.layers.0.mlp.experts.gate_up_proj" in stored
    fused, single = Checkpoint(tmp_path / "fused"), Checkpoint(tmp_path / "single")
    assert "model.layers.1.mlp.experts.5.up_proj.weight" in single.source.names()
    for info in single.spec.tensors():
        assert np.array_equal(fused.read(info.name), single.read(info.name)), info.name


def test_one_expert_is_read_alone(
    build_oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_oracle(CONFIG).save_pretrained(tmp_path, save_original_format=False)
    checkpoint = Checkpoint(tmp_path)
    sizes = []
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda n, dtype: sizes.append(n) or empty(n, dtype=dtype))
    checkpoint.read("model.layers.0.mlp.experts.3.up_proj.weight")
    assert sizes == [24 * 32 * 4]


def test_fused_experts_of_another_shape(build_oracle: Oracle, tmp_path: Path) -> None:
    build_oracle(CONFIG).save_pretrained(tmp_path, save_original_format=False)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"moe_intermediate_size": 24', '"moe_intermediate_size": 16'))
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj.*\[6, 48, 32\].*\[6, 32, 32\]"):
        Checkpoint(tmp_path)
