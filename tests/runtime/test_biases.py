"""Biases of Qwen3 (`attention_bias`): llama.cpp takes those of q, k and v and has no place for the output's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gguf_files import changed

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import FormatError
from qwen_quant.exporters.gguf import export_gguf
from qwen_quant.runtime.session import Session

FAMILIES = pytest.mark.parametrize("architecture", ["qwen3", "qwen3moe"])
TOKENS = np.random.default_rng(5).integers(0, 96, 20).astype(np.int32)


@FAMILIES
def test_logits_with_biases_of_q_k_and_v(
    tiny_model: Callable[..., Any], tmp_path: Path, architecture: str
) -> None:
    model = tiny_model(architecture, "F32", attention_bias=True)
    path = changed(model.path, tmp_path / "m.gguf", without="attn_output.bias")
    biases = [p for name, p in model.reference.named_parameters() if name.endswith("o_proj.bias")]
    kept = [bias.clone() for bias in biases]
    with torch.no_grad():
        for bias in biases:
            bias.zero_()
        difference = np.abs(Session.open(path).logits(TOKENS) - model.reference_logits(TOKENS))
        for bias, value in zip(biases, kept, strict=True):
            bias.copy_(value)
    assert len(biases) == 2 and difference.max() < 3e-3


@FAMILIES
def test_the_outputs_bias_is_refused_by_name(tiny_model: Callable[..., Any], architecture: str) -> None:
    path = tiny_model(architecture, "F32", attention_bias=True).path
    with pytest.raises(
        FormatError, match=r"tensor 'blk\.0\.attn_output\.bias': has no place in this architecture"
    ):
        Session.open(path)


def test_it_is_not_exported_either(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_checkpoint(attention_bias=True))
    with pytest.raises(FormatError, match="attention_bias is true, but GGUF's qwen3 has no place"):
        export_gguf(checkpoint, tmp_path / "m.gguf", "F16")
    assert not (tmp_path / "m.gguf").exists()
