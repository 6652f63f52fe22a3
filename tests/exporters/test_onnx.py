"""ONNX folders: onnxruntime computes from them what the reference model computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.onnx_graph import OnnxGraph

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.exporters.onnx import Form, export_onnx
from qwen_quant.model import load_model

QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": None}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {**QWEN2, "tie_word_embeddings": False},
    "qwen2-tied": QWEN2,
    "qwen3": {},
    "qwen3-untied-head64": {"head_dim": 64, "tie_word_embeddings": False},
    "qwen3-biased": {"attention_bias": True},
    "qwen3-yarn": {"rope_scaling": YARN},
    "qwen2-linear": {**QWEN2, "rope_scaling": {"type": "linear", "factor": 3.0}},
}
TOKENS = np.random.default_rng(1).integers(0, 320, 40).astype(np.int64)
Make = Callable[..., Checkpoint]


@pytest.fixture
def make_model(make_checkpoint: Callable[..., Path], reference: Path) -> Make:
    def make(**changes: Any) -> Checkpoint:
        folder = make_checkpoint(**{"vocab_size": 4112, **changes})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(reference / name, folder / name)
        return Checkpoint(folder)

    return make


def expected(checkpoint: Checkpoint, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """The reference model's logits [T, V]."""
    with torch.no_grad():
        return load_model(checkpoint)(torch.from_numpy(tokens)[None])[0].numpy()


def check_steps(folder: Path, wanted: np.ndarray, limit: float) -> None:
    """All tokens at once, in chunks, and one by one."""
    for cuts in ([40], [7, 20, 40], [30, *range(31, 41)]):
        graph, start, found = OnnxGraph(folder), 0, []
        for stop in cuts:
            found.append(graph(TOKENS[None, start:stop])[0])
            start = stop
        assert np.abs(np.concatenate(found) - wanted).max() < limit, cuts


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_logits_of_every_dense_family(make_model: Make, tmp_path: Path, family: Any) -> None:
    checkpoint = make_model(**family)
    export_onnx(checkpoint, tmp_path / "out", Form("F32"))
    check_steps(tmp_path / "out", expected(checkpoint), 1e-3)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_precision_weights(make_model: Make, tmp_path: Path, kind: str) -> None:
    checkpoint = make_model()
    export_onnx(checkpoint, tmp_path / "out", Form(kind))
    # The checkpoint's BF16 values, all of them normal FP16 numbers or nearly so.
    check_steps(tmp_path / "out", expected(checkpoint), 1e-3)


def test_only_the_last_logits(make_model: Make, tmp_path: Path) -> None:
    checkpoint = make_model()
    export_onnx(checkpoint, tmp_path / "out", Form("F32"))
    last = OnnxGraph(tmp_path / "out")(TOKENS[None], num_logits_to_keep=np.array(1))
    assert last.shape[1] == 1
    assert np.abs(last[0] - expected(checkpoint)[-1:]).max() < 1e-3


def test_batches(make_model: Make, tmp_path: Path) -> None:
    checkpoint = make_model(**QWEN2)
    export_onnx(checkpoint, tmp_path / "out", Form("F32"))
    texts = np.stack([TOKENS, TOKENS[::-1]])
    graph = OnnxGraph(tmp_path / "out", batch=2)
    found = np.concatenate([graph(texts[:, :39]), graph(texts[:, 39:])], axis=1)
    for text, logits in zip(texts, found, strict=True):
        assert np.abs(logits - expected(checkpoint, text.copy())).max() < 1e-3
