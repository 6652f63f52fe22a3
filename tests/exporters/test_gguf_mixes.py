"""File types mean what llama-quantize means by them: the same type for every tensor, so the same size."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import gguf
import pytest
from conftest import TINY
from helpers.llama_quantize import MODELS, OPTIONS, SHAPE, TABLE, Choice, cases, key, shortened

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import UsageError
from qwen_quant.exporters.gguf_mixes import ALIASES, MIXES
from qwen_quant.exporters.gguf_tensors import choose_types, gguf_name
from qwen_quant.exporters.gguf_types import TypeOptions, file_type_of
from qwen_quant.spec import ModelSpec


def choices(model: dict[str, Any], file_type: str, options: TypeOptions) -> Choice:
    """The type that we choose for each matrix, by GGUF name."""
    spec = ModelSpec.from_config({**TINY, **SHAPE, **model})
    checkpoint = SimpleNamespace(spec=spec, quantization=None, is_quantized=lambda name: False)
    found = choose_types(cast(Checkpoint, checkpoint), file_type_of(file_type), options)
    return {gguf_name(c.info): c.type for c in found if c.info.role in ("linear", "embedding", "head")}


def type_options(arguments: list[str], calibrated: bool) -> TypeOptions:
    """llama-quantize's options as ours."""
    given = list(zip(arguments[::2], arguments[1::2], strict=False))
    return TypeOptions.parse(
        dict(given).get("--token-embedding-type"),
        dict(given).get("--output-tensor-type"),
        [value for name, value in given if name == "--tensor-type"],
        pure="--pure" in arguments,
        calibrated=calibrated,
    )


@pytest.mark.parametrize("model", [*MODELS, *OPTIONS])
def test_types_are_llama_quantizes(model: str) -> None:
    table = json.loads(TABLE.read_text())
    tried = 0
    for asked, name, kind, matrix in cases():
        place = key(asked, name, kind, matrix)
        if model != (asked or name) or place not in table:
            continue
        options = type_options(OPTIONS[asked][1] if asked else [], matrix)
        assert shortened(choices(MODELS[name], kind, options)) == table[place], place
        tried += 1
    assert tried >= 3


def test_every_file_type_is_one_of_llama_cpps() -> None:
    for name, mix in MIXES.items():
        assert mix.code.name.split("_", 1)[1] == name
        assert mix.base in gguf.GGMLQuantizationType.__members__
    assert file_type_of("q4_k") == "Q4_K_M" and {file_type_of(name) for name in ALIASES} <= set(MIXES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor-type", "ffn_down"], "--tensor-type ffn_down: must be NAME=TYPE"),
        (["--tensor-type", "=Q6_K"], "must be NAME=TYPE"),
        (["--tensor-type", "a(=Q6_K"], r"--tensor-type a\(=Q6_K: .*regular expression"),
        (["--tensor-type", "a=IQ1_S"], "--tensor-type a IQ1_S: not supported; choose one of F32"),
        (["--output-tensor-type", "Q4_K_M"], "--output-tensor-type Q4_K_M: not supported"),
    ],
)
def test_options_that_mean_nothing(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        type_options(arguments, True)
