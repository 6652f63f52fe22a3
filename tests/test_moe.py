"""Configs with experts: what they say, both spellings, and errors that name the key."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_quant.errors import ConfigError
from qwen_quant.moe import fused_tensors
from qwen_quant.spec import ModelSpec

COMMON: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 6,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
QWEN3_30B_A3B = {
    **COMMON,
    "architectures": ["Qwen3MoeForCausalLM"],
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
QWEN15_MOE_A27B = {
    **COMMON,
    "architectures": ["Qwen2MoeForCausalLM"],
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {info.name: info.shape for info in spec.tensors()}


def test_experts_of_both_families() -> None:
    three, two = ModelSpec.from_config(QWEN3_30B_A3B), ModelSpec.from_config(QWEN15_MOE_A27B)
    mlp = "model.layers.5.mlp."
    assert shapes(three)[f"{mlp}gate.weight"] == (128, 2048)
    assert shapes(three)[f"{mlp}experts.127.down_proj.weight"] == (2048, 768)
    assert f"{mlp}shared_expert_gate.weight" not in shapes(three)
    assert shapes(two)[f"{mlp}experts.59.up_proj.weight"] == (1408, 2048)
    assert shapes(two)[f"{mlp}shared_expert.gate_proj.weight"] == (5632, 2048)
    assert shapes(two)[f"{mlp}shared_expert_gate.weight"] == (1, 2048)
    assert (two.qkv_bias, two.qk_norm, three.qkv_bias, three.qk_norm) == (True, False, False, True)
    roles = {info.name.removeprefix(mlp): (info.role, info.expert) for info in two.layer_tensors(5)}
    assert roles["gate.weight"] == roles["shared_expert_gate.weight"] == ("router", -1)
    assert roles["experts.7.gate_proj.weight"] == ("linear", 7)
    assert roles["shared_expert.gate_proj.weight"] == ("linear", -1)


def test_both_spellings_of_the_number_of_experts() -> None:
    new = {k: v for k, v in QWEN3_30B_A3B.items() if k != "num_experts"} | {"num_local_experts": 128}
    assert ModelSpec.from_config(new) == ModelSpec.from_config(QWEN3_30B_A3B)


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"decoder_sparse_step": 2}, (1, 3, 5)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 5)),
        ({"mlp_only_layers": [0, 5]}, (1, 2, 3, 4)),
        ({"mlp_only_layers": None}, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_which_layers_have_experts(changes: dict[str, Any], sparse: tuple[int, ...]) -> None:
    spec = ModelSpec.from_config({**QWEN3_30B_A3B, **changes})
    found = tuple(i for i in range(6) if f"model.layers.{i}.mlp.gate_proj.weight" not in shapes(spec))
    assert found == sparse == tuple(i for i in range(6) if spec.is_sparse(i))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": None}, "num_experts"),
        ({"num_experts": 10**6}, "num_experts"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok 129 is more than num_experts 128"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size"),
        ({"mlp_only_layers": [1.5]}, "mlp_only_layers"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "shared_expert_intermediate_size"),
    ],
)
def test_errors_name_the_key(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelSpec.from_config({**QWEN3_30B_A3B, **changes})


@given(
    key=st.sampled_from(["num_experts", "num_local_experts", "mlp_only_layers", "decoder_sparse_step"]),
    value=st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=3),
)
def test_any_value_gives_a_spec_or_one_line(key: str, value: Any) -> None:
    try:
        spec = ModelSpec.from_config({**QWEN3_30B_A3B, key: value})
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert all(dim > 0 for info in spec.tensors() for dim in info.shape)


def test_fused_tensors_hold_every_expert_once() -> None:
    spec = ModelSpec.from_config(QWEN15_MOE_A27B)
    assert spec.moe is not None
    gate_up, down = fused_tensors(spec.moe, spec.hidden_size, 2)
    assert (gate_up.shape, down.shape) == ((60, 2816, 2048), (60, 2048, 1408))
    found = dict((*gate_up.parts, *down.parts))
    assert found == {info.name: info.shape for info in spec.layer_tensors(2) if info.expert >= 0}
