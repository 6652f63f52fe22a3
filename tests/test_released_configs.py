"""The released models: every one loads, counts as published, says what its config.json says, and can be packed.

`data/configs.json` holds the keys that fix the arithmetic (those of the context and the norms where they are known),
and the number of parameters that the released checkpoint has (a tied head counted once).
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.dual_chunk import DualChunk
from qwen_quant.errors import FormatError
from qwen_quant.exporters.gptq import check_packable, notes
from qwen_quant.grids.gptq import GROUP_SIZES, IntGrid
from qwen_quant.spec import ModelSpec

RELEASED: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "configs.json").read_text())
# Keys that a spec holds under their own names, and those that Qwen (1) calls otherwise.
SAME = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "tie_word_embeddings"]
SAME += ["max_position_embeddings", "rope_theta", "rms_norm_eps", "head_dim", "num_key_value_heads"]
OTHER_NAMES = {
    "kv_channels": "head_dim",
    "layer_norm_epsilon": "rms_norm_eps",
    "rotary_emb_base": "rope_theta",
}
OF_EXPERTS = ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"]
DENSE_72B = RELEASED["Qwen2.5-72B-Instruct"]["config"]


def shapes_only(spec: ModelSpec) -> Checkpoint:
    """A stand-in for a checkpoint of `spec`, of which only the inventory is looked at: tens of thousands of experts
    are listed once."""
    tensors = spec.tensors()
    inventory = SimpleNamespace(tensors=lambda: tensors)
    return cast("Checkpoint", SimpleNamespace(spec=inventory, folder=Path("model")))


@pytest.fixture(params=RELEASED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(name: str) -> dict[str, Any]:
    return dict(RELEASED[name]["config"])


@pytest.fixture
def spec(config: dict[str, Any]) -> ModelSpec:
    return ModelSpec.from_config(config)


def test_the_number_of_parameters(name: str, spec: ModelSpec) -> None:
    assert sum(prod(info.shape) for info in spec.tensors()) == RELEASED[name]["parameters"]


def test_what_the_config_says(config: dict[str, Any], spec: ModelSpec) -> None:
    names = {**{key: key for key in SAME}, **OTHER_NAMES}
    stated = {ours: config[key] for key, ours in names.items() if key in config}
    assert {ours: getattr(spec, ours) for ours in stated} == stated
    assert spec.intermediate_size == config["intermediate_size"] // (2 if spec.qwen1 else 1)
    assert spec.rope_scaling is None
    assert spec.context_length == min(spec.max_position_embeddings, config.get("seq_length", 10**9))


def test_biases_norms_and_heads(config: dict[str, Any], spec: ModelSpec) -> None:
    qwen3 = config["model_type"].startswith("qwen3")
    assert (spec.qkv_bias, spec.qk_norm, spec.output_bias) == (not qwen3, qwen3, False)
    assert spec.head_dim == (64 if spec.hidden_size in (896, 1024) and not qwen3 else 128)
    heads = [info for info in spec.tensors() if info.role == "head"]
    assert len(heads) == (0 if config["tie_word_embeddings"] else 1)


def test_no_release_attends_through_a_window(config: dict[str, Any], spec: ModelSpec) -> None:
    """Most of them name one: use_sliding_window is what counts, and it is false."""
    assert spec.sliding_window is None and not spec.sliding_layers
    if config["model_type"] == "qwen2" and config.get("sliding_window"):
        used = ModelSpec.from_config(
            {**config, "use_sliding_window": True, "dual_chunk_attention_config": None}
        )
        first = config["max_window_layers"]
        assert used.sliding_layers == tuple(range(first, spec.num_hidden_layers))


def test_experts(config: dict[str, Any], spec: ModelSpec) -> None:
    if "num_experts" not in config:
        assert spec.moe is None
        return
    assert spec.moe is not None
    assert {key: getattr(spec.moe, key) for key in OF_EXPERTS} == {key: config[key] for key in OF_EXPERTS}
    assert spec.moe.shared_expert_intermediate_size == (config.get("shared_expert_intermediate_size") or None)
    assert spec.moe.sparse_layers == tuple(range(spec.num_hidden_layers))


def test_the_1m_models(name: str, spec: ModelSpec) -> None:
    assert spec.dual_chunk == (DualChunk(262144, 8192, 262144) if name.endswith("-1M") else None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("1_8B", (8192, True, True)), ("14B", (2048, True, True)), ("72B", (32768, False, False))],
)
def test_qwen1_beyond_its_context(name: str, expected: tuple[int, bool, bool]) -> None:
    qwen1 = ModelSpec.from_config(RELEASED[f"Qwen-{name}"]["config"]).qwen1
    assert qwen1 is not None
    assert (qwen1.seq_length, qwen1.use_dynamic_ntk, qwen1.use_logn_attn) == expected


def test_every_group_size_fits_every_released_model(name: str, spec: ModelSpec) -> None:
    """Also 72B's 29568 = 128 * 231, and every expert's 768, 1408, 1536 and 2560."""
    if name.endswith("-2507"):
        return  # the shapes of the first release
    checkpoint = shapes_only(spec)
    check_packable(checkpoint)
    assert not [note for size in GROUP_SIZES for note in notes(checkpoint, IntGrid(4, size))]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(
    ("released", "changes", "first", "k", "count"),
    [
        ("Qwen2.5-72B-Instruct", {"intermediate_size": 29600}, "model.layers.0.mlp.down_proj", 29600, 80),
        ("Qwen-72B", {"intermediate_size": 2 * 24672}, "transformer.h.0.mlp.c_proj", 24672, 80),
        (
            "Qwen3-30B-A3B",
            {"moe_intermediate_size": 800},
            "model.layers.0.mlp.experts.0.down_proj",
            800,
            48 * 128,
        ),
        (
            "Qwen1.5-MoE-A2.7B",
            {"shared_expert_intermediate_size": 5600},
            "model.layers.0.mlp.shared_expert.down_proj",
            5600,
            24,
        ),
    ],
)
def test_a_shape_that_does_not_divide_names_a_group_size_that_does(
    released: str, changes: dict[str, int], first: str, k: int, count: int, group_size: int
) -> None:
    checkpoint = shapes_only(ModelSpec.from_config({**RELEASED[released]["config"], **changes}))
    check_packable(checkpoint)
    found = notes(checkpoint, IntGrid(4, group_size))
    if group_size < 0 or k % group_size == 0:
        assert found == []
        return
    (note,) = found
    last = k % group_size
    assert note.startswith(
        f"{first}.weight and {count - 1} more: {k} inputs, so the last group has {last} instead of {group_size}"
    )
    divides = max(size for size in GROUP_SIZES if 0 < size < group_size and k % size == 0)
    assert note.endswith(f"--group-size {divides} divides")


def test_a_shape_that_is_no_multiple_of_32_is_sent_to_gguf() -> None:
    checkpoint = shapes_only(ModelSpec.from_config({**DENSE_72B, "intermediate_size": 29600 + 16}))
    with pytest.raises(FormatError, match=r"gate_proj.*multiples of 32, export to GGUF"):
        check_packable(checkpoint)
