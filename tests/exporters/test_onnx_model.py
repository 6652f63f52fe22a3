"""What the walk over the decoder adds to every graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers.onnx_graph import graph_of
from helpers.onnx_models import FAMILIES, Make, check_steps, expected
from onnx import TensorProto, helper

from qwen_quant.exporters.onnx import Form, export_onnx
from qwen_quant.model import new_rotary


@pytest.mark.parametrize("family", ["qwen3", "qwen3-yarn", "qwen2-linear"])
def test_rotary_tables_follow_from_constants(make_model: Make, tmp_path: Path, family: str) -> None:
    """They take no room in the file, and are the reference model's far out too."""
    checkpoint = make_model(**{**FAMILIES[family], "max_position_embeddings": 40960})
    assert export_onnx(checkpoint, tmp_path / "out", Form("BF16")).bytes < 2_000_000  # they alone have 5 MB
    model = onnx.load(graph_of(tmp_path / "out"))
    nodes = [node for node in model.graph.node if node.name.startswith("/model/rotary/")]
    [attention, *_] = (node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in attention.input[7:9]]
    used = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in model.graph.initializer if tensor.name in used]
    alone = helper.make_model(helper.make_graph(nodes, "rotary", [], outputs, constants), ir_version=10)
    alone.opset_import[0].version = 21
    found = onnxruntime.InferenceSession(alone.SerializeToString()).run(None, {})
    wanted = new_rotary(checkpoint.spec)(0, 40960)
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.abs(ours - theirs[:, : ours.shape[1]].numpy()).max() < 1e-6


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sliding_windows(make_model: Make, tmp_path: Path, family: str) -> None:
    window = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    checkpoint = make_model(**FAMILIES[family], **window)
    export_onnx(checkpoint, tmp_path / "out", Form("F32"))
    check_steps(tmp_path / "out", expected(checkpoint), 1e-3)
