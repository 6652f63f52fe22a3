"""Checkpoints as transformers writes them: its config.json, its dtypes, its shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_quant.checkpoint import INDEX, Checkpoint
from qwen_quant.model import load_model

Oracle = Callable[..., Any]  # the fixture that builds a transformers model

CONFIG: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "rope_parameters": {"rope_type": "default", "rope_theta": 123456.0},
    "eos_token_id": [7, 9],
}
TOKENS = torch.arange(40).reshape(2, 20)


def saved(oracle: Any, folder: Path) -> Checkpoint:
    """The checkpoint that transformers writes for `oracle`."""
    oracle.save_pretrained(folder)
    return Checkpoint(folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_sharded_checkpoint(build_oracle: Oracle, tmp_path: Path, model_type: str, tied: bool) -> None:
    oracle = build_oracle({"model_type": model_type, "tie_word_embeddings": tied, **CONFIG})
    oracle.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / INDEX).exists()
    checkpoint = Checkpoint(tmp_path)
    assert len(set(checkpoint.source.names())) == len(checkpoint.spec.tensors())
    with torch.no_grad():
        assert (load_model(checkpoint)(TOKENS) - oracle(TOKENS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_float_type_is_read_exactly(build_oracle: Oracle, tmp_path: Path, dtype: torch.dtype) -> None:
    oracle = build_oracle({"model_type": "qwen3", **CONFIG}).to(dtype)
    checkpoint = saved(oracle, tmp_path)
    assert checkpoint.spec.torch_dtype == str(dtype).removeprefix("torch.")
    for name, values in load_model(checkpoint).state_dict().items():
        assert torch.equal(values, oracle.state_dict()[name].float()), name


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_spec_of_the_config_that_transformers_writes(
    build_oracle: Oracle, tmp_path: Path, model_type: str
) -> None:
    oracle = build_oracle({"model_type": model_type, **CONFIG})
    spec = saved(oracle, tmp_path).spec
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written and "rope_theta" not in written  # what transformers 5 does
    assert spec.model_type == model_type
    assert spec.rope_theta == 123456.0
    assert spec.eos_token_id == (7, 9)
    assert spec.head_dim == oracle.model.layers[0].self_attn.head_dim


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_inventory_equals_the_state_dict(
    build_oracle: Oracle, model_type: str, tied: bool, tmp_path: Path
) -> None:
    for bias in (False, True) if model_type == "qwen3" else (False,):
        extra = {"attention_bias": True} if bias else {}
        oracle = build_oracle({"model_type": model_type, "tie_word_embeddings": tied, **CONFIG, **extra})
        spec = saved(oracle, tmp_path / str(bias)).spec
        expected = {name: tuple(values.shape) for name, values in oracle.state_dict().items()}
        if tied:
            del expected["lm_head.weight"]
        assert {info.name: info.shape for info in spec.tensors()} == expected
        assert len(spec.tensors()) == len(expected)
