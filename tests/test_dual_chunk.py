"""dual_chunk_attention_config of a config.json: what becomes of it, and which values are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qwen_quant.dual_chunk import DualChunk
from qwen_quant.errors import ConfigError
from qwen_quant.spec import ModelSpec

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 1010000,
}
RELEASED = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
SPARSE = {
    "sparse_attention_enabled": True,
    "sparse_attention_config": [{"0": ["vertical_and_slash", 30, 800]}],
}


def read(stated: Any, **changes: Any) -> DualChunk | None:
    config = {**CONFIG, "dual_chunk_attention_config": stated, **changes}
    return ModelSpec.from_config(config, "here/config.json").dual_chunk


def test_the_released_setting() -> None:
    """As Qwen2.5-7B-Instruct-1M and Qwen2.5-14B-Instruct-1M have it."""
    found = read(RELEASED)
    assert found == DualChunk(262144, 8192, 262144)
    assert (found.chunk_len, found.farthest, found.exact_length) == (253952, 262144, 262144)
    assert found.temperature(262144) == 1.0
    assert found.temperature(2 * 262144) == pytest.approx((0.1 * math.log(2) + 1) ** 2)


def test_sparse_attention_changes_nothing() -> None:
    assert read({**RELEASED, **SPARSE}) == read(RELEASED)


@pytest.mark.parametrize("stated", [None, {}])
def test_no_setting(stated: Any) -> None:
    assert read(stated) is None


def test_without_a_trained_length_there_is_no_temperature() -> None:
    found = read({"chunk_size": 16, "local_size": 4})
    assert found == DualChunk(16, 4, None)
    assert found.temperature(10**6) == 1.0
    assert found.exact_length == 17


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ([RELEASED], "dual_chunk_attention_config is ["),
        (True, "dual_chunk_attention_config is True"),
        ({"local_size": 4}, "dual_chunk_attention_config: key 'chunk_size' is missing"),
        ({"chunk_size": 16}, "dual_chunk_attention_config: key 'local_size' is missing"),
        ({**RELEASED, "chunk_size": 0}, "chunk_size is 0"),
        ({**RELEASED, "chunk_size": 8192.0}, "chunk_size is 8192.0"),
        ({**RELEASED, "local_size": "8192"}, "local_size is '8192'"),
        ({**RELEASED, "local_size": 262144}, "local_size 262144 is not below chunk_size 262144"),
        ({**RELEASED, "original_max_position_embeddings": -1}, "original_max_position_embeddings is -1"),
        ({**RELEASED, "window_size": 3}, "'window_size' is not known"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(stated: Any, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(stated)
    assert str(caught.value).startswith("here/config.json: ")
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "use_sliding_window"),
    ],
)
def test_other_ways_to_long_texts_exclude_it(changes: dict[str, Any], other: str) -> None:
    with pytest.raises(ConfigError, match=f"dual_chunk_attention_config and {other} exclude each other"):
        read(RELEASED, **changes)
