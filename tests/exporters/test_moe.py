"""Models with experts in both formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import FormatError
from qwen_quant.exporters.gguf import export_gguf, plan_file
from qwen_quant.exporters.gptq import export_gptq
from qwen_quant.grids import IntGrid
from qwen_quant.quantize.layer import QuantizedLayer
from qwen_quant.quantize.recipe import Recipe, linear_grid
from qwen_quant.quantize.stream import gptq_layers

MOE = {
    "vocab_size": 4112,
    "tie_word_embeddings": False,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
}
QWEN3 = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "norm_topk_prob": True, **MOE}
QWEN2 = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "head_dim": None,
    "shared_expert_intermediate_size": 96,
    **MOE,
}
FAMILIES = pytest.mark.parametrize("family", [QWEN2, QWEN3], ids=["qwen2moe", "qwen3moe"])
WINDOWS = np.random.default_rng(0).integers(0, 320, (4, 64)).astype(np.int32)
RECIPE = Recipe(num_samples=4, seq_len=64)
Make = Callable[..., Checkpoint]


def decoded(layers: list[QuantizedLayer]) -> dict[str, np.ndarray]:
    return {name: tensor.decode() for layer in layers for name, tensor in layer.tensors.items()}


@FAMILIES
def test_a_gptq_checkpoint_reads_back_and_repacks(make_model: Make, tmp_path: Path, family: Any) -> None:
    checkpoint = make_model(**family)
    grid = IntGrid(4, 32)
    layers = list(gptq_layers(checkpoint, linear_grid(grid), WINDOWS, RECIPE))
    expected = decoded(layers)
    written = export_gptq(checkpoint, layers, tmp_path / "gptq", grid, RECIPE, {})
    found = Checkpoint(tmp_path / "gptq")
    assert "model.layers.1.mlp.experts.7.down_proj.qweight" in found.source
    assert found.source.dtype("model.layers.0.mlp.gate.weight") == "BF16"
    assert "which experts" in written.unquantized["model.layers.0.mlp.gate.weight"]
    for name, values in expected.items():
        assert np.array_equal(found.read(name), values), name
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    modules = [
        name for stage in config["quantization_config"]["modules_in_block_to_quantize"] for name in stage
    ]
    assert sorted(modules) == sorted({name[len("model.layers.0.") : -len(".weight")] for name in expected})

    export_gguf(found, tmp_path / "m.gguf", "Q4_0")
    for name, values in stacks_of(expected).items():
        assert np.array_equal(stored(tmp_path / "m.gguf", name), values), name


def stacks_of(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The stacked experts of both layers by GGUF name."""
    found = {}
    for layer in (0, 1):
        for ours, theirs in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
            rows = [weights[f"model.layers.{layer}.mlp.experts.{e}.{ours}.weight"] for e in range(8)]
            found[f"blk.{layer}.ffn_{theirs}_exps.weight"] = np.stack(rows)
    return found


def stored(path: Path, name: str) -> np.ndarray:
    """A tensor decoded by the gguf library."""
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    shape = tuple(int(n) for n in tensor.shape[::-1])
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).reshape(shape)


@FAMILIES
def test_gguf_of_the_quantizer_holds_its_codes(make_model: Make, tmp_path: Path, family: Any) -> None:
    checkpoint, path = make_model(**family), tmp_path / "m.gguf"
    layers = list(gptq_layers(checkpoint, plan_file(checkpoint, "Q4_0").grids, WINDOWS, RECIPE))
    expected = stacks_of(decoded(layers))
    written = export_gguf(checkpoint, path, "Q4_0", layers=layers)
    assert written.types["model.layers.0.mlp.experts.gate_proj.weight"] == "Q4_0"
    assert written.types["model.layers.0.mlp.gate.weight"] == "F32"
    for name, values in expected.items():
        assert np.array_equal(stored(path, name), values), name


@pytest.mark.parametrize(
    ("family", "changes", "word"),
    [
        (QWEN2, {"norm_topk_prob": True}, "norm_topk_prob is true"),
        (QWEN3, {"norm_topk_prob": False}, "norm_topk_prob is false"),
        (QWEN3, {"mlp_only_layers": [0]}, "only 1 of 2 layers"),
        (QWEN2, {"decoder_sparse_step": 2}, "only 1 of 2 layers"),
    ],
)
def test_what_llama_cpp_would_leave_out(
    make_model: Make, tmp_path: Path, family: Any, changes: Any, word: str
) -> None:
    with pytest.raises(FormatError, match=word):
        export_gguf(make_model(**{**family, **changes}), tmp_path / "m.gguf", "F16")
    assert not (tmp_path / "m.gguf").exists()
