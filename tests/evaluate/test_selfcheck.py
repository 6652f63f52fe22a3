"""The check that ends every export: what it accepts, what it sees, and where its findings lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers.onnx_models import QWEN2_MOE, QWEN3_MOE

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import FormatError
from qwen_quant.evaluate.selfcheck import divergence_limit, self_check
from qwen_quant.evaluate.streamed import streamed_logits
from qwen_quant.evaluate.torch_provider import TorchProvider
from qwen_quant.exporters import gguf as gguf_export
from qwen_quant.exporters.gguf import export_gguf, plan_file
from qwen_quant.runtime.session import Session
from qwen_quant.tokenizer import Tokenizer

Make = Callable[..., Path]
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": None},
    "qwen3moe": QWEN3_MOE,
    "qwen2moe": QWEN2_MOE,
}


def stored(path: Path) -> dict[str, float]:
    """The findings in a GGUF file, by the gguf package."""
    fields = gguf.GGUFReader(path).fields
    prefix = "qwen_quant.check."
    return {k.removeprefix(prefix): f.contents() for k, f in fields.items() if k.startswith(prefix)}


def export(checkpoint: Checkpoint, path: Path, kind: str) -> dict[str, Any]:
    bits = plan_file(checkpoint, kind).fewest_bits(checkpoint)
    return export_gguf(
        checkpoint, path, kind, check=lambda partial: self_check(partial, checkpoint, bits, where=path)
    ).check


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_holds_its_findings(make_model: Make, tmp_path: Path, family: str) -> None:
    checkpoint, path = Checkpoint(make_model(**FAMILIES[family])), tmp_path / "m.gguf"
    found = export(checkpoint, path, "F16")
    assert stored(path) == found
    assert 0 <= found["kld_mean"] < 0.01 and found["top1_agreement"] > 0.95
    assert found["greedy_agreement"] > 0.9 and found["greedy_tokens"] == 16
    assert Session.open(path).eos_ids >= set(Tokenizer.from_folder(checkpoint.folder).eos_ids)
    assert Session.open(path).metadata["qwen_quant.check.tokens"] == found["tokens"] == 4 * 96


@pytest.mark.parametrize("kind", ["Q8_0", "Q2_K"])
def test_what_few_bits_lose_is_no_mistake(reference: Path, tmp_path: Path, kind: str) -> None:
    checkpoint = Checkpoint(reference)
    bits = plan_file(checkpoint, kind).fewest_bits(checkpoint)
    assert bits == int(kind[1])
    assert export(checkpoint, tmp_path / "m.gguf", kind)["kld_mean"] < divergence_limit(bits) / 4


def test_limits_grow_as_bits_fall() -> None:
    limits = [divergence_limit(bits) for bits in range(16, 0, -1)]
    assert limits == sorted(limits)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_wrong_gguf_file_is_not_kept(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    checkpoint, path = Checkpoint(make_model()), tmp_path / "m.gguf"
    name = gguf_export.gguf_name
    swapped = {f"blk.{i}.ffn_gate.weight": f"blk.{i}.ffn_up.weight" for i in range(2)}
    swapped |= {new: old for old, new in swapped.items()}
    monkeypatch.setattr(gguf_export, "gguf_name", lambda info: swapped.get(name(info), name(info)))
    with pytest.raises(FormatError, match=r"m\.gguf: diverges from .* the export is wrong"):
        export(checkpoint, path, kind)
    assert list(tmp_path.glob("*.gguf")) == list(tmp_path.glob(".*.partial")) == []


def test_streamed_experts(make_model: Make) -> None:
    folder = make_model(**QWEN2_MOE)
    windows = np.random.default_rng(0).integers(0, 320, (2, 24)).astype(np.int32)
    provider = TorchProvider(folder)
    for window, found in zip(windows, streamed_logits(Checkpoint(folder), windows), strict=True):
        assert np.abs(found - provider.window_logits(window)).max() < 1e-4
