"""config.json: what is understood becomes a ModelSpec; anything else is one line that names the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_quant.errors import ConfigError
from qwen_quant.fixed import FIXED
from qwen_quant.spec import ModelSpec

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "rope_theta": 1e6,
    "hidden_act": "silu",
}
QWEN2: dict[str, Any] = {**QWEN3, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def refusal(**changes: Any) -> str:
    """The message of the ConfigError that `changes` to a good config cause."""
    with pytest.raises(ConfigError) as caught:
        ModelSpec.from_config({**QWEN3, **changes}, "here/config.json")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("here/config.json: ")
    return message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": [], "model_type": "gemma"}, "gemma"),
        ({"architectures": 3}, "architectures"),
        ({"architectures": [{}]}, "architecture"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling has rope type 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
            "rope_parameters has rope type 'spiral'",
        ),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
        (
            {"layer_types": ["full_attention", "local"], "use_sliding_window": True},
            "layer_types has ['local']",
        ),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
        ({"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers"),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 0}, "sliding_window"),
        ({"layer_types": 7}, "layer_types"),
        ({"layer_types": [{}]}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"intermediate_size": "96"}, "intermediate_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": [2]}, "num_key_value_heads"),
        ({"vocab_size": 2**31}, "vocab_size"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers"),
        ({"num_hidden_layers": -4}, "num_hidden_layers"),
        ({"head_dim": 33}, "head_dim"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"use_sliding_window": "false"}, "use_sliding_window"),
        ({"eos_token_id": "<|im_end|>"}, "eos_token_id"),
        ({"eos_token_id": [2, None]}, "eos_token_id"),
        ({"eos_token_id": -1}, "eos_token_id"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    assert named in refusal(**changes)


OTHER_ARITHMETIC = [
    ("use_mrope", True),
    ("use_rerope", True),
    ("use_dynamic_ntk", True),
    ("mrope_section", [16, 24, 24]),
    ("rope_ratio", 2.0),
    ("rotary_pct", 0.5),
    ("is_causal", False),
    ("attn_output_gate", True),
    ("attention_multiplier", 0.015),
    ("final_logit_softcapping", 30.0),
    ("embedding_multiplier", 12),
    ("mlp_bias", True),
    ("scoring_func", "sigmoid"),
    ("routed_scaling_factor", 2.5),
    ("n_shared_experts", 1),
    ("rotary_emb_base", 5000),
    ("shared_expert_intermediate_size", 64),
]


@pytest.mark.parametrize(("key", "value"), OTHER_ARITHMETIC)
@pytest.mark.parametrize("base", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_other_arithmetic_is_refused_by_name(base: dict[str, Any], key: str, value: Any) -> None:
    message = refusal(**{**base, key: value})
    assert f": {key} is {value!r}, which is not supported for {base['model_type']}; " in message
    assert message.endswith("remove it if it has no effect") or "; it must be " in message


def test_a_long_value_is_cut() -> None:
    assert len(refusal(no_rope_layers=[1] * 500)) < 200


def test_keys_that_the_family_decides() -> None:
    assert "use_qk_norm is True" in refusal(**QWEN2, use_qk_norm=True)
    assert "use_qk_norm is False" in refusal(use_qk_norm=False)
    assert "qkv_bias is False" in refusal(**QWEN2, qkv_bias=False)
    assert "qkv_bias is True" in refusal(qkv_bias=True)
    assert ModelSpec.from_config({**QWEN3, "qkv_bias": True, "attention_bias": True}).qkv_bias


def test_keys_that_say_nothing_new() -> None:
    """As in the released CodeQwen1.5, Qwen2-Math and Qwen3-Coder, and as other programs leave them."""
    said = {"rotary_emb_base": 1000000, "seq_length": 65536, "use_mrope": False, "is_causal": True}
    nothing = {"mrope_section": [], "shared_expert_layers": 0, "n_group": None, "alibi": "", "scale_emb": 1}
    foreign = {"unsloth_version": "2024.9", "use_cache": True, "pretraining_tp": 1, "use_flash_attn": "auto"}
    for base in (QWEN2, {**QWEN3, "use_qk_norm": True, "qkv_bias": False}):
        assert ModelSpec.from_config({**base, **said, **nothing, **foreign}) == ModelSpec.from_config(base)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_a_missing_key_is_named(key: str) -> None:
    config = {k: v for k, v in QWEN3.items() if k != key}
    with pytest.raises(ConfigError, match=key):
        ModelSpec.from_config(config)


def test_heads_that_do_not_divide_the_hidden_size() -> None:
    config = {k: v for k, v in QWEN2.items() if k != "head_dim"}
    with pytest.raises(ConfigError, match="head_dim"):
        ModelSpec.from_config({**config, "hidden_size": 66})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"a": 1} x', "[" * 100_000, "\x00", '"text"'])
def test_a_file_that_is_not_a_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        ModelSpec.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}\xd8")
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelSpec.from_folder(tmp_path)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not found"):
        ModelSpec.from_folder(tmp_path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(
    key=st.sampled_from(
        [*QWEN3, "eos_token_id", "rope_scaling", "rope_parameters", "layer_types", "sliding_window", *FIXED]
    ),
    value=JSON_VALUES,
)
def test_any_value_gives_a_spec_or_one_line(key: str, value: Any) -> None:
    try:
        spec = ModelSpec.from_config({**QWEN3, key: value})
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert all(dim > 0 for info in spec.tensors() for dim in info.shape)


def test_both_spellings_of_the_rotary_base() -> None:
    assert ModelSpec.from_config({**QWEN3, "rope_theta": 5.0}).rope_theta == 5.0
    new = {k: v for k, v in QWEN3.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 7.0}
    assert ModelSpec.from_config(new).rope_theta == 7.0
    assert ModelSpec.from_config({**QWEN3, "rope_scaling": None}).rope_theta == 1e6


def test_biases_and_norms_of_the_families() -> None:
    two, three = ModelSpec.from_config(QWEN2), ModelSpec.from_config(QWEN3)
    assert (two.qkv_bias, two.output_bias, two.qk_norm) == (True, False, False)
    assert (three.qkv_bias, three.output_bias, three.qk_norm) == (False, False, True)
    biased = ModelSpec.from_config({**QWEN3, "attention_bias": True})
    assert (biased.qkv_bias, biased.output_bias) == (True, True)


def test_head_dim_left_out() -> None:
    """Qwen2 divides the hidden size; Qwen3's own default is 128, whatever the hidden size."""
    two = {k: v for k, v in QWEN2.items() if k != "head_dim"}
    three = {k: v for k, v in QWEN3.items() if k != "head_dim"}
    assert ModelSpec.from_config(two).head_dim == 16
    assert ModelSpec.from_config(three).head_dim == 128


def test_inventory_names_each_tensor_once_and_numbers_the_layers() -> None:
    spec = ModelSpec.from_config({**QWEN3, "tie_word_embeddings": False, "attention_bias": True})
    infos = spec.tensors()
    assert len({info.name for info in infos}) == len(infos)
    assert {info.role for info in infos} == {"embedding", "head", "norm", "bias", "linear"}
    for info in infos:
        assert (f".layers.{info.layer}." in info.name) == (info.layer >= 0)
    assert spec.tensors() == spec.outer_tensors() + spec.layer_tensors(0) + spec.layer_tensors(1)


@pytest.mark.parametrize(("stored", "expected"), [(None, ()), (0, (0,)), (5, (5,)), ([5, 6], (5, 6))])
def test_end_of_text_ids(stored: Any, expected: tuple[int, ...]) -> None:
    assert ModelSpec.from_config({**QWEN3, "eos_token_id": stored}).eos_token_id == expected


def test_reading_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    assert ModelSpec.from_folder(tmp_path) == ModelSpec.from_config(QWEN3)
