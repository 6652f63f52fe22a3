"""The shapes of the released dense models: every one loads, counts as published, and can be packed.

`data/configs.json` holds what fixes the shapes, and the number of parameters that the released checkpoint has (a
tied head counted once).
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import FormatError
from qwen_quant.exporters.gptq import check_packable, notes
from qwen_quant.grids.gptq import GROUP_SIZES, IntGrid
from qwen_quant.spec import ModelSpec

RELEASED: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "configs.json").read_text())
# Everything up to these sizes shares embedding and head.
TIED = {"Qwen1.5": 0.5, "CodeQwen1.5": 0, "Qwen2": 1.5, "Qwen2.5": 3, "Qwen3": 4}


def shapes_only(spec: ModelSpec) -> Checkpoint:
    """A stand-in for a checkpoint of `spec`, of which only the inventory is looked at."""
    return cast("Checkpoint", SimpleNamespace(spec=spec, folder=Path("model")))


@pytest.fixture(params=RELEASED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def spec(name: str) -> ModelSpec:
    return ModelSpec.from_config(RELEASED[name]["config"])


def billions(name: str) -> float:
    """The size in a model's name."""
    return float(next(part for part in name.split("-") if part.endswith("B"))[:-1])


def test_the_number_of_parameters(name: str, spec: ModelSpec) -> None:
    count = sum(prod(info.shape) for info in spec.tensors())
    assert count == RELEASED[name]["parameters"]


def test_tied_or_not(name: str, spec: ModelSpec) -> None:
    assert spec.tie_word_embeddings == (billions(name) <= TIED[name.split("-")[0]])
    heads = [info for info in spec.tensors() if info.role == "head"]
    assert len(heads) == (0 if spec.tie_word_embeddings else 1)


def test_biases_and_norms(name: str, spec: ModelSpec) -> None:
    qwen3 = name.startswith("Qwen3")
    head_dim = 64 if billions(name) == 0.5 else 128
    assert (spec.qkv_bias, spec.qk_norm, spec.head_dim) == (not qwen3, qwen3, head_dim)


def test_every_group_size_fits_every_released_model(spec: ModelSpec) -> None:
    """Also 72B's 29568 = 128 * 231, and the experts."""
    check_packable(shapes_only(spec))
    assert not [note for size in GROUP_SIZES for note in notes(shapes_only(spec), IntGrid(4, size))]


@pytest.mark.parametrize(("group_size", "last"), [(32, None), (64, 32), (128, 32), (-1, None)])
def test_a_shape_that_does_not_divide_names_a_group_size_that_does(group_size: int, last: int | None) -> None:
    config = {**RELEASED["Qwen2.5-72B-Instruct"]["config"], "intermediate_size": 29600}  # 32 * 925
    checkpoint = shapes_only(ModelSpec.from_config(config))
    check_packable(checkpoint)
    found = notes(checkpoint, IntGrid(4, group_size))
    if last is None:
        assert found == []
        return
    (note,) = found
    named = (
        f"model.layers.0.mlp.down_proj.weight and 79 more: 29600 inputs, so the last group has {last} instead"
    )
    assert note.startswith(named) and note.endswith("--group-size 32 divides")


def test_a_shape_that_is_no_multiple_of_32_is_sent_to_gguf() -> None:
    config = {**RELEASED["Qwen2.5-72B-Instruct"]["config"], "intermediate_size": 29600 + 16}
    with pytest.raises(FormatError, match=r"gate_proj.*multiples of 32, export to GGUF"):
        check_packable(shapes_only(ModelSpec.from_config(config)))
