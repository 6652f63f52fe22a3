"""A run that was stopped goes on where it was, to the same bits, and only when nothing has changed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.checkpoints import rewrite

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import CalibrationError
from qwen_quant.grids import Q4_0, IntGrid
from qwen_quant.quantize.layer import QuantizedLayer
from qwen_quant.quantize.recipe import Recipe, linear_grid
from qwen_quant.quantize.resume import LayerStore
from qwen_quant.quantize.stream import gptq_layers
from qwen_quant.safetensors import SafetensorsFile

RECIPE = Recipe(num_samples=4, seq_len=64)
WINDOWS = np.random.default_rng(0).integers(0, 320, (4, 64)).astype(np.int32)


def layers(
    folder: Path, store: LayerStore, recipe: Recipe = RECIPE, windows: np.ndarray = WINDOWS
) -> list[QuantizedLayer]:
    return list(gptq_layers(Checkpoint(folder), linear_grid(IntGrid(4, 32)), windows, recipe, store))


def stop_after_one(folder: Path, store: LayerStore, recipe: Recipe = RECIPE) -> None:
    run = gptq_layers(Checkpoint(folder), linear_grid(IntGrid(4, 32)), WINDOWS, recipe, store)
    next(run)
    run.close()


@pytest.mark.parametrize(
    "recipe",
    [RECIPE, replace(RECIPE, desc_act=True), replace(RECIPE, output_aware=True)],
    ids=["in-order", "desc-act", "output-aware"],
)
def test_the_same_bits(make_checkpoint: Callable[..., Path], tmp_path: Path, recipe: Recipe) -> None:
    folder = make_checkpoint(num_hidden_layers=3)
    whole = layers(folder, LayerStore(tmp_path / "whole"), recipe)
    store = LayerStore(tmp_path / "store")
    stop_after_one(folder, store, recipe)
    assert len(list(store.folder.iterdir())) == 1
    for first, second in zip(whole, layers(folder, store, recipe), strict=True):
        assert [r.name for r in first.reports] == [r.name for r in second.reports]
        for name, tensor in first.tensors.items():
            other = second.tensors[name]
            assert np.array_equal(tensor.codes, other.codes)
            assert np.array_equal(tensor.scales.scale, other.scales.scale)
            assert (tensor.group_index is None) == (other.group_index is None)


def test_what_changed_is_named(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint()
    store = LayerStore(tmp_path / "store")
    stop_after_one(folder, store)
    with pytest.raises(CalibrationError, match="another recipe"):
        layers(folder, store, replace(RECIPE, damp_percent=0.02))
    with pytest.raises(CalibrationError, match="another calibration data"):
        layers(folder, store, windows=WINDOWS[::-1].copy())
    other = make_checkpoint(seed=1, name="other")
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(CalibrationError, match=r"another (calibration data|weights).*without --resume"):
        layers(folder, store)


def test_gradients_follow_from_later_weights(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, recipe = make_checkpoint(), replace(RECIPE, output_aware=True)
    store = LayerStore(tmp_path / "store")
    stop_after_one(folder, store, recipe)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = SafetensorsFile(folder / "model.safetensors").read_raw(name)
    rewrite(folder, {name: weight[::-1].copy()})
    with pytest.raises(CalibrationError, match="another weights"):
        layers(folder, store, recipe)


def test_another_grid_is_another_recipe(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint()
    store = LayerStore(tmp_path / "store")
    stop_after_one(folder, store)
    with pytest.raises(CalibrationError, match="another recipe"):
        list(gptq_layers(Checkpoint(folder), linear_grid(Q4_0()), WINDOWS, RECIPE, store))


@pytest.mark.parametrize("command", ["gptq", "export"])
def test_a_killed_command_resumes(reference: Path, tmp_path: Path, command: str) -> None:
    options = ["reference", "--num-samples", "16", "--seq-len", "256", "--json"]
    options += ["--type", "Q2_K"] if command == "export" else []

    def start(output: Path, *more: str) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "qwen_quant.cli", command, *options, "-o", str(output), *more]
        return subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    output, kept = tmp_path / "out", tmp_path / ".out.layers"
    process = start(output)
    while process.poll() is None and not list(kept.glob("layer-*")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not output.exists() and kept.exists()
    assert start(output, "--resume").wait() == 0
    name = "model.safetensors" if command == "gptq" else ""
    assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
