"""Activations in files: the same result to the bit, nothing left behind, no memory held, and a full disk is told."""

from __future__ import annotations

import errno
import gc
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import ResourceError
from qwen_quant.grids import Q4_0
from qwen_quant.quantize import scratch
from qwen_quant.quantize.layer import QuantizedLayer
from qwen_quant.quantize.recipe import Recipe, linear_grid
from qwen_quant.quantize.resume import LayerStore
from qwen_quant.quantize.stream import gptq_layers

RECIPE = Recipe(num_samples=20, seq_len=64)  # two batches
WINDOWS = np.random.default_rng(0).integers(0, 320, (20, 64)).astype(np.int32)
SPARSE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}


def same(first: QuantizedLayer, second: QuantizedLayer) -> bool:
    return first.tensors.keys() == second.tensors.keys() and all(
        np.array_equal(tensor.codes, second.tensors[name].codes)
        and np.array_equal(tensor.scales.scale, second.tensors[name].scales.scale)
        for name, tensor in first.tensors.items()
    )


@pytest.mark.parametrize("changes", [{}, SPARSE])
def test_the_same_bits(make_checkpoint: Callable[..., Path], tmp_path: Path, changes: dict) -> None:
    checkpoint, grids = (
        Checkpoint(make_checkpoint(**changes)),
        lambda info: None if info.role in ("norm", "bias", "router") else Q4_0(),
    )
    folder, store = tmp_path / "files", LayerStore(tmp_path / "layers")
    plain = gptq_layers(checkpoint, grids, WINDOWS, RECIPE, store)
    spilled = gptq_layers(checkpoint, grids, WINDOWS, RECIPE, spill=folder)
    for first, second in zip(plain, spilled, strict=True):
        assert same(first, second)
        assert folder.is_dir() and not list(folder.iterdir())  # files without names
    gc.collect()
    assert not scratch._maps
    # What was kept by one is taken up by the other: the states that entered each layer have the same hash.
    for first in gptq_layers(checkpoint, grids, WINDOWS, RECIPE, store, spill=folder):
        assert first.tensors


def resident() -> int:
    """Bytes of this process's memory that lie in files."""
    return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what is resident")
def test_what_was_let_go_is_no_memory(tmp_path: Path) -> None:
    size = 32 << 20
    before = resident()
    tensor = scratch.empty((8, size // 32), tmp_path).fill_(3.0)
    assert resident() > before + size // 2
    scratch.let_go()
    assert resident() < before + size // 4
    assert float(tensor.sum()) == 3 * tensor.numel()
    beside = scratch.beside(tensor[2:4], torch.ones(5, 7))
    scratch.let_go()
    assert torch.equal(beside, torch.ones(5, 7))
    assert len(scratch._maps) == 2


def test_beside_what_is_in_memory() -> None:
    x = torch.ones(3)
    assert scratch.beside(torch.zeros(2, 2), x) is x


def test_a_full_disk(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(scratch, "_reserve", full)
    checkpoint = Checkpoint(make_checkpoint())
    with pytest.raises(ResourceError, match=r"No space left on device.*-o.*--num-samples"):
        next(gptq_layers(checkpoint, linear_grid(Q4_0()), WINDOWS, RECIPE, spill=tmp_path))
