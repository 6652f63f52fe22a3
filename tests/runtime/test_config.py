"""Keys of a GGUF file that would change the arithmetic: understood, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.gguf_files import changed

from qwen_quant.errors import FormatError
from qwen_quant.runtime.session import Session

TinyModels = Callable[..., Any]


@pytest.mark.parametrize(
    ("architecture", "key", "value", "problem"),
    [
        ("qwen2", "attention.causal", False, "attention to later tokens is not supported"),
        ("qwen2", "rope.dimension_count", 16, "partial rotation is not supported"),
        ("qwen2", "attention.head_count_kv", 3, "does not divide the number of heads"),
        ("qwen2", "attention.layer_norm_rms_epsilon", 0.0, "is not a positive number"),
        ("qwen3", "attention.key_length", 33, "is odd"),
        ("qwen3", "attention.value_length", 64, "differs from the key length"),
        ("qwen3", "context_length", 0, "is out of range"),
        ("qwen", "feed_forward_length", 383, "is odd, but counts gate and up together"),
        ("qwen2moe", "expert_used_count", 9, "is more than the 8 experts"),
        ("qwen2moe", "expert_weights_norm", True, "is not this architecture's"),
        ("qwen3moe", "expert_weights_norm", False, "is not this architecture's"),
        ("qwen3moe", "expert_weights_scale", 2.5, "other values than 1 are not supported"),
        ("qwen3moe", "expert_gating_func", 2, "is not softmax"),
    ],
)
def test_other_arithmetic_is_refused_by_name(
    tiny_model: TinyModels, tmp_path: Path, architecture: str, key: str, value: Any, problem: str
) -> None:
    keys = {"attention.value_length": 33} if value == 33 else {}
    path = changed(tiny_model(architecture, "F32").path, tmp_path / "m.gguf", {**keys, key: value})
    with pytest.raises(FormatError) as caught:
        Session.open(path)
    message = str(caught.value)
    assert f"m.gguf: key '{architecture}.{key}': " in message
    assert problem in message and "\n" not in message


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("qwen2", {"attention.causal": True, "rope.dimension_count": 32}),
        ("qwen2moe", {"expert_weights_norm": False, "expert_gating_func": 1}),
        ("qwen3moe", {"expert_weights_norm": True, "expert_weights_scale": 1.0}),
    ],
)
def test_what_says_nothing_new_is_taken(
    tiny_model: TinyModels, tmp_path: Path, architecture: str, keys: dict[str, Any]
) -> None:
    model = tiny_model(architecture, "F32")
    path = changed(model.path, tmp_path / "m.gguf", keys)
    assert (Session.open(path).prefill([1, 2, 3]) == Session.open(model.path).prefill([1, 2, 3])).all()
