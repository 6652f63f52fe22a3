"""Contexts in GGUF files: extended as readers extend them, and ended or refused where they would go wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import FormatError
from qwen_quant.exporters.gguf import export_gguf, notes
from qwen_quant.model import load_model
from qwen_quant.runtime.session import Session

MakeModel = Callable[..., Checkpoint]
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


def test_metadata_of_an_extended_context(make_model: MakeModel, tmp_path: Path) -> None:
    def keys(**rope: Any) -> dict[str, Any]:
        export_gguf(make_model(rope_scaling=rope or None), tmp_path / "m.gguf", "F16")
        fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
        return {k: fields[f"qwen3.{k}"].contents() for k in ["context_length"] if f"qwen3.{k}" in fields} | {
            k.removeprefix("qwen3.rope.scaling."): f.contents()
            for k, f in fields.items()
            if k.startswith("qwen3.rope.scaling.")
        }

    assert keys() == {"context_length": 512}
    assert keys(type="linear", factor=2.0) == {"context_length": 512, "type": "linear", "factor": 2.0}
    yarn = {"context_length": 1024, "type": "yarn", "factor": 4.0, "original_context_length": 256}
    assert keys(**YARN) == {**yarn, "attn_factor": 1.0}
    stated = keys(**YARN, attention_factor=1.5)
    assert stated == {**yarn, "attn_factor": pytest.approx(1.5 / (0.1 * math.log(4) + 1))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": {**YARN, "beta_fast": 16}},
            r"beta_fast 16\.0; llama\.cpp runs qwen3 files with 32\.0",
        ),
        ({"rope_scaling": {**YARN, "beta_slow": 2}}, r"beta_slow 2\.0"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "truncate False"),
        (
            {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1},
            "sliding_window 100 .* 1 layers",
        ),
    ],
)
def test_what_gguf_readers_would_ignore(
    make_model: MakeModel, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        export_gguf(make_model(**changes), tmp_path / "m.gguf", "F16")
    assert not (tmp_path / "m.gguf").exists()


def test_a_window_as_wide_as_the_context_is_none(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model(use_sliding_window=True, sliding_window=512, max_window_layers=0).folder
    export_gguf(Checkpoint(folder), tmp_path / "m.gguf", "F16")
    assert not any("sliding" in key for key in gguf.GGUFReader(tmp_path / "m.gguf").fields)


@pytest.mark.parametrize(
    ("setting", "exact"),
    [
        ({"chunk_size": 64, "local_size": 16}, 65),
        ({"chunk_size": 64, "local_size": 16, "original_max_position_embeddings": 50}, 50),
        ({"chunk_size": 64, "local_size": 40}, 48),
        ({"chunk_size": 1000, "local_size": 10}, 512),
    ],
)
def test_the_context_ends_where_dual_chunk_attention_begins_to_matter(
    make_model: MakeModel, tmp_path: Path, setting: dict[str, int], exact: int
) -> None:
    """The engine agrees with the reference model up to there, and takes no longer text."""
    checkpoint = make_model(dual_chunk_attention_config=setting)
    export_gguf(checkpoint, tmp_path / "m.gguf", "F32")
    session = Session.open(tmp_path / "m.gguf")
    assert session.n_ctx == exact
    assert [f"context_length is {exact} instead of 512" in note for note in notes(checkpoint)] == (
        [True] if exact < 512 else []
    )
    tokens = np.random.default_rng(1).integers(0, 4112, min(exact, 65)).astype(np.int32)
    expected = load_model(checkpoint)(torch.from_numpy(tokens)[None].long())[0].numpy()
    assert np.abs(session.logits(tokens) - expected).max() < 0.02  # the engine's cache is FP16
