"""Experts: routed tokens, cold ones, stacks, and resuming."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.grids import IntGrid
from qwen_quant.model import load_model
from qwen_quant.quantize import experts, stream
from qwen_quant.quantize.layer import QuantizedLayer
from qwen_quant.quantize.recipe import Recipe, linear_grid
from qwen_quant.quantize.resume import LayerStore

MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
QWEN3 = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "norm_topk_prob": True, **MOE}
QWEN2 = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "head_dim": None,
    "shared_expert_intermediate_size": 96,
    "mlp_only_layers": [1],
    **MOE,
}
FAMILIES = pytest.mark.parametrize("family", [QWEN2, QWEN3], ids=["qwen2_moe", "qwen3_moe"])
WINDOWS = np.random.default_rng(0).integers(0, 320, (16, 64)).astype(np.int32)
RECIPE = Recipe(num_samples=16, seq_len=64)
GRID = IntGrid(4, 32)
Make = Callable[..., Path]


def solved(checkpoint: Checkpoint, store: LayerStore | None = None, **recipe: Any) -> list[QuantizedLayer]:
    changed = dataclasses.replace(RECIPE, **recipe)
    return list(stream.gptq_layers(checkpoint, linear_grid(GRID), WINDOWS, changed, store))


@FAMILIES
def test_every_linear_is_solved_and_beats_round_to_nearest(make_checkpoint: Make, family: Any) -> None:
    checkpoint = Checkpoint(make_checkpoint(**family))
    reports = [report for layer in solved(checkpoint) for report in layer.reports]
    linears = [info.name for info in checkpoint.spec.tensors() if info.role == "linear"]
    assert sorted(report.name for report in reports) == sorted(linears)
    assert all(report.error < report.rtn_error for report in reports if report.tokens)


@FAMILIES
def test_tokens_are_counted_per_expert_and_the_cold_ones_listed(make_checkpoint: Make, family: Any) -> None:
    checkpoint = Checkpoint(make_checkpoint(**family))
    model = load_model(checkpoint)
    first, *_ = solved(checkpoint)
    for name, tensor in first.tensors.items():
        model.get_submodule(name.removesuffix(".weight")).weight.data = torch.from_numpy(tensor.decode())
    inputs: list[torch.Tensor] = []
    block = model.model.layers[0].mlp
    block.register_forward_hook(lambda module, given, out: inputs.append(given[0]))
    model(torch.from_numpy(WINDOWS).long())
    chosen, _ = block.route(inputs[0].flatten(0, 1))
    counts = torch.bincount(chosen.flatten(), minlength=6).tolist()
    for report in first.reports:
        if ".experts." in report.name:
            tokens = counts[int(report.name.split(".")[5])]
            k = 32 if "down_proj" in report.name else 64
            assert abs(report.tokens - tokens) <= 2  # a router's near tie may fall the other way
            assert report.pooled == max(0.0, 1 - report.tokens / (2 * k))
        else:
            assert (report.tokens, report.pooled) == (16 * 64, 0.0)


def test_an_expert_without_tokens_is_solved_from_the_pool(make_checkpoint: Make) -> None:
    checkpoint = Checkpoint(make_checkpoint(**QWEN3))
    read = checkpoint.source.read

    def shunned(name: str) -> np.ndarray:
        values = read(name)
        if name == "model.layers.0.mlp.gate.weight":
            # Whatever the sign of a token's product with the first row, two of the first four beat 0.
            values = values[0] * np.array([1, 2, -1, -2, 0, 0], np.float32)[:, None]
        return values

    checkpoint.source.read = shunned  # type: ignore[method-assign]
    [first, _] = solved(checkpoint)
    cold = [r for r in first.reports if ".experts." in r.name and r.tokens == 0]
    assert {report.name.split(".")[5] for report in cold} == {"4", "5"} and len(cold) == 6
    for report in cold:
        assert report.pooled == 1.0
        assert report.error < report.rtn_error


def test_the_hessian_of_a_cold_expert() -> None:
    moments = experts.Calibration(4, "here")
    moments.add(torch.eye(4)[:2] * 3)  # two of the eight tokens that would make it warm
    mixed, share = experts.shrunk(moments, 7, lambda expert: torch.eye(4) * expert)
    assert share == 0.75
    torch.testing.assert_close(mixed, 0.25 * moments.hessian + 0.75 * 7 * torch.eye(4))
    moments.add(torch.ones(6, 4))
    mixed, share = experts.shrunk(moments, 7, lambda expert: pytest.fail("is not cold"))
    assert share == 0 and torch.equal(mixed, moments.hessian)


@FAMILIES
def test_a_few_experts_at_a_time_give_the_same(
    make_checkpoint: Make, family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(make_checkpoint(**family))
    whole = solved(checkpoint)
    monkeypatch.setattr(experts, "FLOATS_AT_ONCE", 40_000)
    assert [len(e) for e in experts.groups_of_experts(checkpoint.spec.moe, 64)] == [2, 2, 2]
    again = {report.name: report for report in solved(checkpoint)[0].reports}
    assert len(again) == len(whole[0].reports)
    for first in whole[0].reports:
        second = again[first.name]
        assert (first.tokens, first.pooled) == (second.tokens, second.pooled)
        assert first.error == pytest.approx(second.error, rel=0.05)


@FAMILIES
@pytest.mark.parametrize("desc_act", [False, True])
def test_resumed_to_the_same_bits(make_checkpoint: Make, tmp_path: Path, family: Any, desc_act: bool) -> None:
    checkpoint = Checkpoint(make_checkpoint(**family))
    whole = solved(checkpoint, desc_act=desc_act)
    store = LayerStore(tmp_path / "store")
    recipe = dataclasses.replace(RECIPE, desc_act=desc_act)
    run = stream.gptq_layers(checkpoint, linear_grid(GRID), WINDOWS, recipe, store)
    next(run)
    run.close()
    for first, second in zip(whole, solved(checkpoint, store, desc_act=desc_act), strict=True):
        assert first.reports == second.reports
        for name, tensor in first.tensors.items():
            assert np.array_equal(tensor.codes, second.tensors[name].codes)
