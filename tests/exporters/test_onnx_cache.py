"""ONNX folders with a quantized cache: onnxruntime rounds keys and values as their scales say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.onnx_graph import graph_of
from helpers.onnx_models import QWEN2, TOKENS, Make

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import UsageError
from qwen_quant.exporters.onnx import Form, export_onnx
from qwen_quant.grids.kv import KVCodes, KVGrid
from qwen_quant.grids.kv_layout import KVCacheSpec, KVLayer, KVLayout
from qwen_quant.model import load_model
from qwen_quant.model.kv_cache import new_quantized_cache
from qwen_quant.quantize.kv_ranges import ChannelScales, channel_scales
from qwen_quant.runtime.session import Session

WINDOWS = TOKENS.reshape(2, -1).astype(np.int32)


@dataclass
class FixedScales(KVGrid):
    """Symmetric codes of `bits` with a scale for each channel [n_kv_heads, head_dim]."""

    scales: np.ndarray
    bits: int

    def bits_per_value(self, head_dim: int) -> float:
        return self.bits

    def encode(self, x: Any) -> KVCodes:
        top = 2 ** (self.bits - 1)
        return KVCodes((x / torch.from_numpy(self.scales)[:, None]).round().clamp(-top, top - 1))

    def decode(self, stored: KVCodes) -> Any:
        return stored.codes * torch.from_numpy(self.scales)[:, None]


def reference_logits(checkpoint: Checkpoint, scales: ChannelScales | None) -> np.ndarray:
    caches = None
    if scales is not None:
        halves = [
            [KVLayout(FixedScales(layer, scales.bits)) for layer in half]
            for half in (scales.keys, scales.values)
        ]
        layers = tuple(KVLayer(*pair) for pair in zip(*halves, strict=True))
        caches = new_quantized_cache(KVCacheSpec("fixed", layers))
    with torch.no_grad():
        return load_model(checkpoint)(torch.from_numpy(TOKENS)[None], caches)[0].numpy()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", [QWEN2, {"head_dim": 64}], ids=["qwen2", "qwen3"])
def test_it_rounds_as_the_scales_say(make_model: Make, tmp_path: Path, family: Any, bits: int) -> None:
    checkpoint = make_model(**family)
    scales = channel_scales(checkpoint, WINDOWS, bits)
    export_onnx(checkpoint, tmp_path / "out", Form("F32"), cache=scales)
    session = Session.open(tmp_path / "out")
    wanted, exact = reference_logits(checkpoint, scales), reference_logits(checkpoint, None)
    found = np.array([session.step(int(token)) for token in TOKENS])
    # What is near a tie may be rounded to either side, and what follows differs in turn.
    assert np.abs(found - wanted).mean() < 0.1 * np.abs(exact - wanted).mean()
    session.reset()
    at_once = session.extend(TOKENS)
    assert np.abs(at_once - wanted).mean() < 0.1 * np.abs(exact - wanted).mean()
    spec = checkpoint.spec
    assert session.engine.kv_bytes_per_token == 2 * spec.num_hidden_layers * spec.kv_size * bits / 8


def test_the_graph_says_so(make_model: Make, tmp_path: Path) -> None:
    checkpoint = make_model()
    scales = channel_scales(checkpoint, WINDOWS, 4)
    export_onnx(checkpoint, tmp_path / "out", Form("F32"), cache=scales)
    import onnx

    model = onnx.load(graph_of(tmp_path / "out"), load_external_data=False)
    past = {i.name: i.type.tensor_type for i in model.graph.input if i.name.startswith("past")}
    assert {t.elem_type for t in past.values()} == {onnx.TensorProto.UINT8}
    assert {t.shape.dim[3].dim_value for t in past.values()} == {checkpoint.spec.head_dim // 2}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert "int4" in metadata["qwen_quant.kv_cache"]


def test_a_range_covers_every_position(make_model: Make) -> None:
    """Both channels that RoPE turns into one another have the range of their pair."""
    scales = channel_scales(make_model(), WINDOWS, 8)
    half = scales.keys.shape[-1] // 2
    np.testing.assert_array_equal(scales.keys[..., :half], scales.keys[..., half:])
    assert (scales.keys > 0).all()
    assert (scales.values > 0).all()


def test_what_it_cannot_be(make_model: Make, tmp_path: Path) -> None:
    checkpoint = make_model()
    scales = channel_scales(checkpoint, WINDOWS, 8)
    with pytest.raises(UsageError, match="standard Attention of --opset 23 has FP32 caches only"):
        export_onnx(checkpoint, tmp_path / "out", Form("F32", opset=23), cache=scales)
    assert not list(tmp_path.glob("out*"))
