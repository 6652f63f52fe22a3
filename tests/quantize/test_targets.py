"""Targets: what each linear lacks is measured between two whole models, and making up for it lowers the divergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen_quant import calib_data
from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import CalibrationError
from qwen_quant.grids import IntGrid
from qwen_quant.model import Model, load_model
from qwen_quant.quantize import inputs, layer_run, targets
from qwen_quant.quantize.recipe import Recipe, linear_grid
from qwen_quant.quantize.stream import gptq_layers
from qwen_quant.tokenizer import Tokenizer

RECIPE = Recipe(num_samples=8, seq_len=64)
GRID = IntGrid(4, 32)
WINDOWS = np.random.default_rng(0).integers(0, 320, (8, 64)).astype(np.int32)
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "head_dim": None,
    "shared_expert_intermediate_size": 96,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
# What each linear's outputs are added to is what this module of its layer reads.
ADDED_TO = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}


def quantized(checkpoint: Checkpoint, windows: np.ndarray, recipe: Recipe) -> Model:
    """The model with its layers quantized and decoded."""
    model = load_model(checkpoint)
    for layer in gptq_layers(checkpoint, linear_grid(GRID), windows, recipe):
        for name, tensor in layer.tensors.items():
            model.get_submodule(name.removesuffix(".weight")).weight.data = torch.from_numpy(tensor.decode())
    return model


def read_by(model: Model, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """What modules read, [tokens, size]."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: found.update({name: inputs[0].flatten(0, -2)})

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("changes", "at_once"),
    [({}, 64), (QWEN2, 64), (MOE, 64), ({}, 192)],
    ids=["qwen3", "qwen2", "moe", "part-of-a-batch"],
)
def test_what_is_lacking(
    changes: dict[str, Any],
    at_once: int,
    make_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Linears see a prefix that stays as it is once it is quantized: two forward passes tell what each lacked."""
    checkpoint = Checkpoint(make_checkpoint(**changes))
    monkeypatch.setattr(inputs, "TOKENS_AT_ONCE", at_once)
    monkeypatch.setattr(inputs.Narrow, "of", Wide)  # test_inputs.py has what FP16 loses
    aims: list[tuple[Tensor, ...]] = []
    solve = layer_run.solve

    def watched(weights: list[Tensor], hessian: Tensor, *rest: Any, **options: Any) -> Any:
        aims.extend((weight, hessian) for weight in weights)
        return solve(weights, hessian, *rest, **options)

    monkeypatch.setattr(layer_run, "solve", watched)
    whole, tokens = load_model(checkpoint), torch.from_numpy(WINDOWS).long()
    model = quantized(checkpoint, WINDOWS, RECIPE)
    linears = [
        info.name.removesuffix(".weight")
        for info in checkpoint.spec.tensors()
        if info.role == "linear" and info.expert < 0
    ]
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    linears.sort(key=lambda name: (name.split(".")[2], order.index(name.split(".")[-1])))
    layers = {name: name[: name.index(".", len("model.layers."))] for name in linears}
    names = linears + [f"{layers[name]}.{norm}" for name in linears for norm in ADDED_TO.values()]
    with_prefix, exact = read_by(model, names, tokens), read_by(whole, names, tokens)
    assert len(aims) == len(linears)
    half = WINDOWS.size // 2
    for name, (found, hessian) in zip(linears, aims, strict=True):
        x, weight = with_prefix[name], whole.get_submodule(name).weight
        lack = (exact[name] - x) @ weight.T
        norm = ADDED_TO.get(name.removeprefix(f"{layers[name]}."))
        if norm is not None:
            lack += exact[f"{layers[name]}.{norm}"] - with_prefix[f"{layers[name]}.{norm}"]
        if "shared_expert" in name:  # beside experts, whose targets are their own outputs
            lack = torch.zeros_like(lack)
        torch.testing.assert_close(hessian, x.T @ x / len(x), rtol=1e-3, atol=1e-5 * float(x.square().mean()))
        expected = weight + ridge(x, lack[:half], hessian)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(weight.std()))


@dataclass
class Wide:
    """In the place of `Narrow`: values as they are."""

    values: Tensor

    def beside(self, hidden: Tensor) -> Wide:
        return self

    def wide(self) -> Tensor:
        return self.values


def ridge(x: Tensor, y: Tensor, hessian: Tensor) -> Tensor:
    """Least squares from the normal equations in float64, y being known of the first tokens."""
    h = hessian.double() + targets.damping(hessian).diag()
    return torch.linalg.solve(h, x[: len(y)].double().T @ y.double() / len(y)).T.float()


def test_what_is_told_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 48, generator=generator), torch.randn(300, 24, generator=generator)
    x[:, 5] *= 30
    found = targets.told(y.T @ x / 300, x.T @ x / 300)
    # Rows that hold it to 0 stand for the damping.
    held = (300 * targets.damping(x.T @ x / 300).double()).sqrt().diag()
    rows = torch.cat([x.double(), held]), torch.cat([y.double(), torch.zeros(48, 24)])
    torch.testing.assert_close(found.double(), torch.linalg.lstsq(*rows).solution.T, rtol=1e-3, atol=1e-5)


def test_damping_lies_between_an_input_and_the_mean_of_all() -> None:
    hessian = torch.tensor([1.0, 0.0, 16.0, 3.0]).diag()
    expected = targets.DAMPING * torch.tensor([5.0, 0.0, 80.0, 15.0]).sqrt() + 5 * targets.LEAST
    torch.testing.assert_close(targets.damping(hessian), expected)


def test_inputs_without_variance_tell_nothing() -> None:
    assert torch.equal(targets.told(torch.ones(2, 4), torch.zeros(4, 4)), torch.zeros(2, 4))


def test_targets_lower_the_divergence(reference: Path) -> None:
    """On text that calibration has not seen."""
    checkpoint = Checkpoint(reference)
    tokenizer, documents = Tokenizer.from_folder(reference), calib_data.load("builtin")
    windows = calib_data.sample(documents, tokenizer, 40, 256, 0)
    seen, unseen = windows[:32], torch.from_numpy(windows[32:]).long()
    exact = load_model(checkpoint)(unseen).log_softmax(-1)

    def divergence(corrected: bool) -> float:
        recipe = replace(RECIPE, correct_targets=corrected)
        found = quantized(checkpoint, seen, recipe)(unseen).log_softmax(-1)
        return float((exact.exp() * (exact - found)).sum(-1).mean())

    assert divergence(True) < 0.95 * divergence(False)  # of few tokens; docs/quantization.md has more


def test_full_precision_that_is_not_finite_names_the_layer(make_checkpoint: Callable[..., Path]) -> None:
    """The quantized weights may well keep clear of what overflows."""
    checkpoint = Checkpoint(make_checkpoint())
    run = layer_run.LayerRun(checkpoint, 0, lambda info: None, RECIPE, torch.device("cpu"))
    hidden = torch.zeros(1, 4, checkpoint.spec.hidden_size)
    table = load_model(checkpoint).rotary(0, 4)
    with torch.no_grad(), pytest.raises(CalibrationError, match="outputs are not finite"):
        run.solve_all(hidden, table, torch.full_like(hidden, float("inf")))
