"""What happens after an ONNX folder is written: accuracy levels, the self-check, the card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.onnx_graph import graph_of
from helpers.onnx_models import Make, write_gptq

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import FormatError, UsageError
from qwen_quant.evaluate.selfcheck import self_check
from qwen_quant.evaluate.streamed import streamed_logits
from qwen_quant.evaluate.torch_provider import TorchProvider
from qwen_quant.exporters.onnx import Form, export_onnx
from qwen_quant.exporters.onnx_accuracy import product_level
from qwen_quant.grids import QuantizedTensor
from qwen_quant.runtime.onnx import OnnxEngine

TEXTS = np.random.default_rng(2).integers(0, 320, (2, 32))


def levels(folder: Path) -> list[int]:
    model = onnx.load(graph_of(folder), load_external_data=False)
    return [product_level(node) for node in model.graph.node if node.op_type == "MatMulNBits"]


@pytest.fixture
def quantized(make_model: Make, tmp_path: Path) -> Checkpoint:
    return write_gptq(make_model(), tmp_path / "gptq", bits=4, group_size=32)


def test_levels_as_asked(quantized: Checkpoint, tmp_path: Path) -> None:
    for level in ("0", "4"):
        export_onnx(quantized, tmp_path / level, Form(accuracy_level=level))
        assert set(levels(tmp_path / level)) == {int(level)}
    with pytest.raises(UsageError, match="--accuracy-level 2: choose 0, 4 or auto"):
        export_onnx(quantized, tmp_path / "other", Form(accuracy_level="2"))


def test_levels_by_error(quantized: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large channel that its block's weights ignore leaves no bits to the others: those products stay exact."""
    read, integers = quantized.read, quantized.quantized

    def with_an_outlier(name: str) -> np.ndarray:
        values = read(name)
        if name == "model.layers.1.post_attention_layernorm.weight":
            values[[3, 40]] = 500
        return values

    def ignoring_it(name: str) -> QuantizedTensor:
        tensor = integers(name)
        if "layers.1.mlp.gate" in name:
            tensor.codes[:, [3, 40]] = 8
        return tensor

    monkeypatch.setattr(quantized, "read", with_an_outlier)
    monkeypatch.setattr(quantized, "quantized", ignoring_it)
    export_onnx(quantized, tmp_path / "out", Form(accuracy_level="auto"), texts=TEXTS)
    assert levels(tmp_path / "out").count(0) == 1
    card = (tmp_path / "out" / "README.md").read_text()
    record = json.loads(card.split("```json")[1].split("```")[0])["accuracy"]
    assert ["layers.1/mlp" in node for node in record["kept_at_level_0"]] == [True]
    assert record["trials"]["0"]["top1_agreement"] == 1
    assert record["trials"]["auto"]["top1_agreement"] >= record["trials"]["4"]["top1_agreement"] - 0.05


def test_streamed_logits(make_model: Make) -> None:
    checkpoint = make_model()
    windows = TEXTS.astype(np.int32)
    provider = TorchProvider(checkpoint.folder)
    for window, found in zip(windows, streamed_logits(checkpoint, windows), strict=True):
        assert np.abs(found - provider.window_logits(window)).max() < 1e-4


def test_a_good_export_passes(make_model: Make, tmp_path: Path) -> None:
    checkpoint = make_model()
    written = export_onnx(
        checkpoint, tmp_path / "out", Form("F16"), check=lambda path: self_check(path, checkpoint, 16)
    )
    assert written.check["kld_mean"] < 1e-6 and written.check["top1_agreement"] == 1
    properties = onnx.load(graph_of(tmp_path / "out"), load_external_data=False).metadata_props
    stored = {entry.key: entry.value for entry in properties}
    assert json.loads(stored["qwen_quant.check"]) == written.check
    assert "top-1 agreement 100.00 %" in (tmp_path / "out" / "README.md").read_text()


def test_a_wrong_export_leaves_nothing(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_model()
    sound, read = Checkpoint(checkpoint.folder), checkpoint.read
    monkeypatch.setattr(
        checkpoint, "read", lambda name: -read(name) if "layers.1.input" in name else read(name)
    )
    with pytest.raises(FormatError, match=r"diverges from .* the export is wrong"):
        export_onnx(checkpoint, tmp_path / "out", Form("F32"), check=lambda path: self_check(path, sound, 16))
    assert not (tmp_path / "out").exists()


def test_a_cache_that_is_wrong_is_seen(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_model()
    run = OnnxEngine._run

    def forgetful(engine: OnnxEngine, tokens: np.ndarray, keep: int) -> np.ndarray:
        """Takes every later token for the first of its text."""
        if len(tokens) == 1:
            engine.n_past = 0
        return run(engine, tokens, keep)

    monkeypatch.setattr(OnnxEngine, "_run", forgetful)
    with pytest.raises(FormatError, match="of a greedy answer is not the one"):
        export_onnx(
            checkpoint, tmp_path / "out", Form("F32"), check=lambda path: self_check(path, checkpoint, 16)
        )
    assert not (tmp_path / "out").exists()
