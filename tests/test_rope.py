"""rope_scaling and sliding windows of a config.json: what becomes of them, and which keys are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_quant.errors import ConfigError
from qwen_quant.rope import RopeScaling
from qwen_quant.spec import ModelSpec

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
}
RELEASED = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
YARN = {"rope_type": "yarn", "factor": 4.0}


def spec(**changes: Any) -> ModelSpec:
    return ModelSpec.from_config({**CONFIG, **changes}, "here/config.json")


def test_the_released_yarn_settings() -> None:
    """As the cards of Qwen2.5 and Qwen3 tell to set them."""
    scaling = spec(rope_scaling=RELEASED).rope_scaling
    assert scaling == RopeScaling("yarn", 4.0, 32768, attention_factor=0.1 * math.log(4) + 1)
    assert spec(rope_scaling=RELEASED).context_length == 131072
    assert spec(rope_scaling=RELEASED, max_position_embeddings=200_000).context_length == 200_000


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_every_yarn_key(key: str) -> None:
    stated = {
        **YARN,
        "original_max_position_embeddings": 1000,
        "attention_factor": 1.5,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
        "rope_theta": 5000.0,
    }
    found = spec(**{key: stated})
    assert found.rope_theta == 5000.0
    assert found.rope_scaling == RopeScaling("yarn", 4.0, 1000, 1.5, 16.0, 2.0, False)


def test_the_trained_length_left_out_or_beside() -> None:
    assert spec(rope_scaling=YARN).rope_scaling == RopeScaling("yarn", 4.0, 32768, 0.1 * math.log(4) + 1)
    outside = spec(rope_scaling=RELEASED, original_max_position_embeddings=4096).rope_scaling
    assert outside is not None and outside.original_max_position_embeddings == 4096


def test_mscale() -> None:
    scaling = spec(rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.5}).rope_scaling
    expected = (0.1 * 0.707 * math.log(4) + 1) / (0.1 * 0.5 * math.log(4) + 1)
    assert scaling is not None and scaling.attention_factor == pytest.approx(expected)
    alone = spec(rope_scaling={**YARN, "mscale": 0.707}).rope_scaling
    assert alone is not None and alone.attention_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_linear_and_default() -> None:
    linear = spec(rope_scaling={"type": "linear", "factor": 2})
    assert linear.rope_scaling == RopeScaling("linear", 2.0, 32768)
    assert linear.context_length == 32768
    assert spec(rope_scaling={"rope_type": "default"}).rope_scaling is None
    assert spec(rope_scaling={**RELEASED, "rope_type": "yarn", "attention_factor": None}) == spec(
        rope_scaling=RELEASED
    )


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, "rope_scaling has rope type 'dynamic'"),
        ({**YARN, "finetuned": True}, "rope_scaling: 'finetuned' is not known"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "rope_scaling: 'beta_fast' is not known"),
        ({"rope_type": "default", "factor": 2.0}, "rope_scaling: 'factor' is not known"),
        ({"rope_type": "yarn"}, "rope_scaling: key 'factor' is missing"),
        ({**YARN, "factor": "4"}, "rope_scaling: factor is '4'"),
        ({**YARN, "factor": 0.5}, "rope_scaling: factor is 0.5"),
        ({**YARN, "type": "linear"}, "rope_scaling: type is 'linear'"),
        ({**YARN, "truncate": 1}, "rope_scaling: truncate is 1"),
        ({**YARN, "attention_factor": -1}, "rope_scaling: attention_factor is -1"),
        ({**YARN, "beta_fast": 1e-9}, "rope_scaling: beta_fast is 1e-09"),
        ({**YARN, "beta_fast": 1, "beta_slow": 32}, "beta_fast 1 and beta_slow 32"),
        ({**YARN, "original_max_position_embeddings": 1}, "original_max_position_embeddings 1"),
        ({**YARN, "original_max_position_embeddings": 4.5}, "original_max_position_embeddings is 4.5"),
        ({**YARN, "rope_theta": 1.0}, "rope_theta is 1.0"),
        ({**YARN, "partial_rotary_factor": 0.5}, "rope_scaling: partial_rotary_factor is 0.5"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(rope: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spec(rope_scaling=rope)
    assert str(caught.value).startswith("here/config.json: ")
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_two_answers_are_none() -> None:
    with pytest.raises(ConfigError, match="rope_scaling and rope_parameters disagree"):
        spec(rope_scaling=RELEASED, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert spec(rope_scaling=RELEASED, rope_parameters={**RELEASED, "rope_type": "yarn"}).rope_scaling


@given(
    rope=st.dictionaries(
        st.sampled_from(["factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale"]),
        st.floats() | st.integers() | st.none(),
    ),
    theta=st.floats(),
    truncate=st.booleans(),
)
def test_any_number_gives_a_range_or_one_line(rope: dict[str, Any], theta: float, truncate: bool) -> None:
    try:
        found = spec(rope_scaling={**YARN, **rope, "truncate": truncate}, rope_theta=theta)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert found.rope_scaling is not None
        first, last = found.rope_scaling.blended(found.rope_theta, found.head_dim)
        assert 0 <= first <= last < found.head_dim


def test_which_layers_have_a_window() -> None:
    assert spec(use_sliding_window=False, sliding_window=8, max_window_layers=0).sliding_layers == ()
    later = spec(use_sliding_window=True, sliding_window=8, max_window_layers=3)
    assert [later.window(layer) for layer in range(4)] == [None, None, None, 8]
    assert spec(use_sliding_window=True, sliding_window=8, max_window_layers=0).sliding_layers == (0, 1, 2, 3)
    assert spec(use_sliding_window=True).sliding_window is None  # from layer 28 on, of 4
    assert spec(use_sliding_window=True, sliding_window=None, max_window_layers=0).sliding_layers == ()
    types = ["sliding_attention", "full_attention"] * 2
    mixed = spec(use_sliding_window=True, sliding_window=8, max_window_layers=3, layer_types=types)
    assert mixed.sliding_layers == (0, 2)
    assert spec(use_sliding_window=True, max_window_layers=0).sliding_window == 4096
    full = spec(use_sliding_window=True, max_window_layers=0, layer_types=["full_attention"] * 4)
    assert full.sliding_window is None
