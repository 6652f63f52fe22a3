"""Embedding and head: solved after the layers, in parts, and kept like a layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.exporters.gguf import export_gguf, plan_file
from qwen_quant.grids import Q4_0
from qwen_quant.quantize.layer import QuantizedLayer
from qwen_quant.quantize.recipe import Recipe
from qwen_quant.quantize.resume import LayerStore
from qwen_quant.quantize.stream import gptq_layers
from qwen_quant.runtime.gguf import GGUFFile
from qwen_quant.safetensors import SafetensorsFile

RECIPE = Recipe(num_samples=4, seq_len=64)
WINDOWS = np.random.default_rng(0).integers(0, 320, (4, 64)).astype(np.int32)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def quantized(folder: Path, names: tuple[str, ...], store: LayerStore | None = None) -> list[QuantizedLayer]:
    """All that a run yields which quantizes the tensors `names` alone."""
    return list(
        gptq_layers(
            Checkpoint(folder), lambda info: Q4_0() if info.name in names else None, WINDOWS, RECIPE, store
        )
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_solved_for_what_it_reads(make_checkpoint: Callable[..., Path], tied: bool) -> None:
    name = EMBEDDING if tied else HEAD
    *layers, outer = quantized(make_checkpoint(tie_word_embeddings=tied), (name,))
    assert [layer.layer for layer in layers] == [0, 1] and outer.layer == -1
    [report] = outer.reports
    assert (report.name, report.tokens) == (name, WINDOWS.size)
    assert 0 < report.error < report.rtn_error
    assert outer.tensors[name].codes.shape == (320, 64)


def test_an_embedding_alone_is_searched(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(tie_word_embeddings=False)
    outer = quantized(folder, (EMBEDDING,))[-1]
    weights = Checkpoint(folder).read(EMBEDDING)

    def error(values: np.ndarray) -> float:
        return float(np.square(weights - values).sum())

    assert outer.reports == []
    assert error(outer.tensors[EMBEDDING].decode()) < error(Q4_0().plain_rounding(weights).decode())


def test_parts_change_nothing(make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint()
    whole = quantized(folder, (EMBEDDING,))[-1]
    monkeypatch.setattr("qwen_quant.tensor_source.CHUNK_BYTES", 1 << 12)
    parts = quantized(folder, (EMBEDDING,))[-1]
    assert parts.reports[0].error == pytest.approx(whole.reports[0].error, rel=0.02)
    assert parts.tensors[EMBEDDING].codes.shape == whole.tensors[EMBEDDING].codes.shape


def test_it_is_kept_and_taken_again(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, store = make_checkpoint(tie_word_embeddings=False), LayerStore(tmp_path / "store")
    first = quantized(folder, (EMBEDDING, HEAD), store)[-1]
    kept = SafetensorsFile(store.folder / "outer.safetensors").entries
    assert {f"{HEAD}.codes", f"{EMBEDDING}.codes"} <= set(kept)
    second = quantized(folder, (EMBEDDING, HEAD), store)[-1]
    for name, tensor in first.tensors.items():
        assert np.array_equal(tensor.codes, second.tensors[name].codes)


def test_the_file_holds_its_codes(reference: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(reference)
    plan = plan_file(checkpoint, "Q8_0")
    windows = np.random.default_rng(0).integers(0, 4096, (2, 32)).astype(np.int32)
    layers = list(gptq_layers(checkpoint, plan.grids, windows, RECIPE))
    expected = layers[-1].tensors[EMBEDDING].decode()
    export_gguf(checkpoint, tmp_path / "m.gguf", "Q8_0", layers=layers)
    assert np.array_equal(GGUFFile(tmp_path / "m.gguf").read_tensor("token_embd.weight"), expected)
