"""ONNX graphs of standard operators only: onnxruntime and onnx's own reference evaluator agree with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers.onnx_graph import OnnxGraph, graph_of
from helpers.onnx_models import (
    FAMILIES,
    QWEN2_MOE,
    QWEN3_MOE,
    TOKENS,
    Make,
    check_steps,
    expected,
    operators,
    write_gptq,
)
from onnx.reference import ReferenceEvaluator

from qwen_quant.errors import UsageError
from qwen_quant.exporters.onnx import Form, export_onnx

ALL = {
    **FAMILIES,
    "qwen2moe": QWEN2_MOE,
    "qwen3moe": QWEN3_MOE,
    "window": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
}


def check_standard(folder: Path) -> None:
    """onnx's checker with shape inference, and no operator of anybody's own."""
    onnx.checker.check_model(graph_of(folder), full_check=True)
    model = onnx.load(graph_of(folder), load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]


def evaluated(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of tokens [T] read in two pieces by onnx's reference evaluator."""
    evaluator = ReferenceEvaluator(str(graph_of(folder)))
    graph, found = OnnxGraph(folder), []
    caches: dict[str, Any] = graph.caches
    for start, stop in ((0, 6), (6, len(tokens))):
        feeds = {
            "input_ids": tokens[None, start:stop],
            "attention_mask": np.ones((1, stop), dtype=np.int64),
            "position_ids": np.arange(start, stop)[None],
            "num_logits_to_keep": np.array(0),
            **caches,
        }
        outputs = dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))
        found.append(outputs.pop("logits")[0])
        caches = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
    return np.concatenate(found)


@pytest.mark.parametrize("family", ALL.values(), ids=list(ALL))
def test_logits_of_every_family(make_model: Make, tmp_path: Path, family: Any) -> None:
    checkpoint = make_model(**family)
    export_onnx(checkpoint, tmp_path / "out", Form("F32", opset=23))
    check_standard(tmp_path / "out")
    wanted = expected(checkpoint)
    check_steps(tmp_path / "out", wanted, 1e-3)
    assert np.abs(evaluated(tmp_path / "out", TOKENS[:10]) - wanted[:10]).max() < 1e-3


@pytest.mark.parametrize(
    ("family", "grid"),
    [
        (QWEN2_MOE, {"bits": 4, "group_size": 32}),
        ({}, {"bits": 4, "group_size": 32, "sym": False, "desc_act": True}),
        (FAMILIES["qwen2"], {"bits": 8, "group_size": 32}),
        ({"intermediate_size": 160}, {"bits": 8, "group_size": 64, "sym": False}),
    ],
)
def test_integers(make_model: Make, tmp_path: Path, family: Any, grid: Any) -> None:
    checkpoint = write_gptq(make_model(**family), tmp_path / "gptq", **grid)
    export_onnx(
        checkpoint, tmp_path / "out", Form(token_embedding_type="F16", output_tensor_type="F16", opset=23)
    )
    check_standard(tmp_path / "out")
    wanted = expected(checkpoint)
    check_steps(tmp_path / "out", wanted, 1e-3)
    assert "DequantizeLinear" in operators(tmp_path / "out")
    assert np.abs(evaluated(tmp_path / "out", TOKENS[:10]) - wanted[:10]).max() < 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_is_the_fused_graph_s(make_model: Make, tmp_path: Path, tied: bool) -> None:
    checkpoint = make_model(tie_word_embeddings=tied)
    kinds = {"token_embedding_type": "int8", "output_tensor_type": "int8"}
    export_onnx(checkpoint, tmp_path / "fused", Form("F32", **kinds))
    export_onnx(checkpoint, tmp_path / "out", Form("F32", opset=23, **kinds))
    check_standard(tmp_path / "out")
    wanted = OnnxGraph(tmp_path / "fused")(TOKENS[None])[0]
    check_steps(tmp_path / "out", wanted, 1e-3)
    assert np.abs(evaluated(tmp_path / "out", TOKENS[:10]) - wanted[:10]).max() < 1e-3


def test_padding_on_the_left(make_model: Make, tmp_path: Path) -> None:
    checkpoint = make_model()
    export_onnx(checkpoint, tmp_path / "out", Form("F32", opset=23))
    short = TOKENS[:30]
    tokens = np.stack([TOKENS, np.concatenate([np.zeros(10, dtype=np.int64), short])])
    mask = np.ones((2, 40), dtype=np.int64)
    mask[1, :10] = 0
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    found = OnnxGraph(tmp_path / "out", batch=2)(tokens, attention_mask=mask, position_ids=positions)
    assert np.abs(found[0] - expected(checkpoint)).max() < 1e-3
    assert np.abs(found[1, 10:] - expected(checkpoint, short)).max() < 1e-3


def test_what_standard_operators_lack(make_model: Make, tmp_path: Path) -> None:
    checkpoint = make_model()
    with pytest.raises(UsageError, match=r"embed_tokens\.weight cannot be int4"):
        export_onnx(checkpoint, tmp_path / "out", Form("F32", token_embedding_type="int4", opset=23))
    with pytest.raises(UsageError, match="--opset 17: not supported"):
        export_onnx(checkpoint, tmp_path / "out", Form("F32", opset=17))
    assert not (tmp_path / "out").exists()
