"""A graph in pieces computes what it computes at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.onnx_graph import graph_of
from helpers.onnx_models import QWEN2, QWEN3_MOE, Make, write_gptq

from qwen_quant.exporters import onnx_pieces
from qwen_quant.exporters.onnx import Form, export_onnx
from qwen_quant.exporters.onnx_accuracy import choose_levels
from qwen_quant.runtime.onnx import open_graph

TEXTS = np.random.default_rng(3).integers(0, 320, (2, 24))


def feeds(model: onnx.ModelProto, text: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of a prompt on an empty cache."""
    found = {"input_ids": text[None], "position_ids": np.arange(len(text))[None]}
    found["attention_mask"] = np.ones_like(text)[None]
    for value in model.graph.input:
        if "past" in value.name:
            _, heads, _, size = (dim.dim_value for dim in value.type.tensor_type.shape.dim)
            found[value.name] = np.zeros((1, heads, 0, size), np.float32)
    return found


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("family", [{}, {**QWEN2, "tie_word_embeddings": False}, QWEN3_MOE])
def test_pieces_are_the_whole(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: dict, sym: bool
) -> None:
    checkpoint = write_gptq(make_model(**family), tmp_path / "gptq", bits=8, group_size=32, sym=sym)
    export_onnx(checkpoint, tmp_path / "out", Form(accuracy_level="0"))
    path = graph_of(tmp_path / "out")
    model = onnx.load(path, load_external_data=False)
    session = open_graph(path)
    monkeypatch.setattr(onnx_pieces, "PIECE_BYTES", 12_000)
    opened: list[int] = []

    def counted(piece: Path) -> object:
        found = onnx.load(piece, load_external_data=False)
        opened.append(len(found.graph.node))
        return open_graph(piece)

    monkeypatch.setattr(onnx_pieces, "open_graph", counted)
    inputs = [feeds(model, text) for text in TEXTS]
    found, seconds = onnx_pieces.run_pieces(path.with_name(".piece"), model, inputs, ["logits"])
    assert len(opened) > 10 and seconds > 0
    for values, feed in zip(found, inputs, strict=True):
        assert values.keys() == {"logits"}
        assert values["logits"].flags.owndata  # not a part of a session's arena, which would stay with it
        assert np.abs(values["logits"] - session.run(["logits"], feed)[0]).max() < 1e-5
    assert not path.with_name(".piece").exists()


def test_levels_do_not_depend_on_pieces(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_gptq(make_model(), tmp_path / "gptq", bits=4, group_size=32)
    export_onnx(checkpoint, tmp_path / "out", Form(accuracy_level="0"))
    path = graph_of(tmp_path / "out")
    whole = choose_levels(path, TEXTS)
    monkeypatch.setattr(onnx_pieces, "PIECE_BYTES", 12_000)
    apart = choose_levels(path, TEXTS)
    assert apart.exact.keys() == whole.exact.keys() and apart.fast.keys() == whole.fast.keys()
    errors, again = ({**found.exact, **found.fast} for found in (whole, apart))
    assert errors == pytest.approx(again, rel=1e-3)
