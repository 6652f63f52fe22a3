"""The layer stream: every linear better than round-to-nearest, sequential inputs, failures by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import CalibrationError, CheckpointError, UsageError
from qwen_quant.grids import Q4_0, IntGrid
from qwen_quant.model import load_model
from qwen_quant.quantize.recipe import Recipe, linear_grid
from qwen_quant.quantize.stream import gptq_layers, pick_device, plain_layers
from qwen_quant.safetensors import f32_to_bf16

RECIPE = Recipe(num_samples=8, seq_len=64)


def windows(vocab: int = 320, samples: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, (samples, 64)).astype(np.int32)


@pytest.mark.parametrize("changes", [{}, {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}])
def test_every_linear_beats_round_to_nearest(make_checkpoint: Callable[..., Path], changes: dict) -> None:
    checkpoint = Checkpoint(make_checkpoint(**changes))
    layers = list(gptq_layers(checkpoint, linear_grid(IntGrid(4, 32)), windows(), RECIPE))
    reports = [report for layer in layers for report in layer.reports]
    linears = [info.name for info in checkpoint.spec.tensors() if info.role == "linear"]
    assert sorted(report.name for report in reports) == sorted(linears)
    assert all(report.error < report.rtn_error for report in reports)
    assert all(report.tokens == 8 * 64 for report in reports)


def test_calibration_sees_the_quantized_prefix(make_checkpoint: Callable[..., Path]) -> None:
    """Hidden states after the stream equal those of a model with the decoded weights put in."""
    checkpoint = Checkpoint(make_checkpoint())
    tokens = windows()
    model = load_model(checkpoint)
    plain = replace(RECIPE, correct_targets=False)  # whose errors are those of the checkpoint's weights
    for layer in gptq_layers(checkpoint, linear_grid(IntGrid(2, 32)), tokens, plain):
        for name, tensor in layer.tensors.items():
            model.get_submodule(name.removesuffix(".weight")).weight.data = torch.from_numpy(tensor.decode())
    # The second layer's own error, measured on the quantized model's activations, must be what was reported.
    captured: list[torch.Tensor] = []
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    down.register_forward_hook(lambda module, inputs, output: captured.append(inputs[0]))
    model(torch.from_numpy(tokens).long())
    x = captured[0].reshape(-1, captured[0].shape[-1])
    exact = torch.from_numpy(checkpoint.read("model.layers.1.mlp.down_proj.weight"))
    relative = ((x @ (exact - down.weight).T).square().sum() / (x @ exact.T).square().sum()).item()
    reported = next(r.error for r in layer.reports if r.name.endswith("down_proj.weight"))
    assert relative == pytest.approx(reported, rel=0.05)


def test_same_seed_same_codes(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(make_checkpoint())
    runs = [list(gptq_layers(checkpoint, linear_grid(Q4_0()), windows(), RECIPE)) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        for name, tensor in first.tensors.items():
            assert np.array_equal(tensor.codes, second.tensors[name].codes)


def test_plain_layers_need_no_calibration(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(make_checkpoint())
    [first, _] = plain_layers(checkpoint, linear_grid(Q4_0()))
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(first.tensors[name].codes, Q4_0().plain_rounding(checkpoint.read(name)).codes)


def test_non_finite_activations_name_the_layer(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint()
    checkpoint = Checkpoint(folder)
    read = checkpoint.source.read

    def huge(name: str) -> np.ndarray:
        values = read(name)
        return values * 1e38 if "layers.1.input_layernorm" in name else values

    checkpoint.source.read = huge  # type: ignore[method-assign]
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.self_attn"):
        list(gptq_layers(checkpoint, linear_grid(Q4_0()), windows(), RECIPE))


def test_activations_too_large_to_be_squared_name_the_layer(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(make_checkpoint())
    read = checkpoint.source.read

    def large(name: str) -> np.ndarray:
        values = read(name)
        return values * 1e20 if "layers.1.input_layernorm" in name else values

    checkpoint.source.read = large  # type: ignore[method-assign]
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.self_attn.*reach \d\.\de\+\d\d"):
        list(gptq_layers(checkpoint, linear_grid(Q4_0()), windows(), RECIPE))


def test_fewer_tokens_than_inputs_are_noted(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(make_checkpoint())
    inputs = {info.name: info.shape[1] for info in checkpoint.spec.tensors() if info.role == "linear"}
    tokens = windows(samples=1)  # 64: enough for the hidden size, too few for the intermediate size
    [first, _] = gptq_layers(checkpoint, linear_grid(IntGrid(4, 32)), tokens, RECIPE)
    assert {report.name for report in first.reports if report.note} == {
        report.name for report in first.reports if inputs[report.name] > tokens.size
    }
    [down] = [report for report in first.reports if "down_proj" in report.name]
    assert "rank-deficient, 64 tokens for 96 inputs" in down.note and not down.fallback


def test_token_beyond_the_vocabulary(make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(CalibrationError, match="vocab_size"):
        next(gptq_layers(Checkpoint(make_checkpoint()), linear_grid(Q4_0()), windows(vocab=400), RECIPE))


def test_unknown_device_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--device"):
        pick_device("cuda:99")


def test_nan_weight_names_the_tensor(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint()
    checkpoint = Checkpoint(folder)
    file = checkpoint.source._file("model.safetensors")
    entry = file.entries["model.layers.1.mlp.up_proj.weight"]
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(entry.offset + 20)
        stream.write(f32_to_bf16(np.array([np.nan], np.float32)).tobytes())
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        list(gptq_layers(checkpoint, linear_grid(Q4_0()), windows(), RECIPE))


def test_activations_computed_again_give_the_same_bits(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(make_checkpoint())
    grids = linear_grid(Q4_0())
    kept = gptq_layers(checkpoint, grids, windows(), RECIPE)
    again = gptq_layers(checkpoint, grids, windows(), RECIPE, keep_activations=False)
    for first, second in zip(kept, again, strict=True):
        for name, tensor in first.tensors.items():
            assert np.array_equal(tensor.codes, second.tensors[name].codes)
            assert np.array_equal(tensor.scales.scale, second.tensors[name].scales.scale)
