"""Budgets: losses that come true, and plans that spend the bytes where they save the most."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import QWEN3_MOE
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import UsageError
from qwen_quant.grids.gguf import gguf_grid
from qwen_quant.model import load_model
from qwen_quant.quantize.budget import Option, spend
from qwen_quant.quantize.recipe import Recipe
from qwen_quant.quantize.sensitivity import measure_losses
from qwen_quant.quantize.stream import gptq_layers

RECIPE = Recipe(num_samples=16, seq_len=64)
OPTIONS = st.lists(st.tuples(st.integers(1, 60), st.floats(0, 10)), min_size=1, max_size=5)
SPARSE = {**QWEN3_MOE, "intermediate_size": 64}


def menu_of(options: list[tuple[int, float]]) -> list[Option]:
    return [Option(f"T{number}", nbytes, loss) for number, (nbytes, loss) in enumerate(options)]


@given(menus=st.lists(OPTIONS, min_size=1, max_size=4), budget=st.integers(1, 250))
@settings(max_examples=200, deadline=None)
def test_plans_fit_and_are_nearly_the_best(menus: list[list[tuple[int, float]]], budget: int) -> None:
    named = {f"w{number}": menu_of(options) for number, options in enumerate(menus)}
    plans = list(itertools.product(*named.values()))
    fitting = [plan for plan in plans if sum(option.nbytes for option in plan) <= budget]
    if not fitting:
        with pytest.raises(UsageError, match="too small"):
            spend(named, budget)
        return
    found = spend(named, budget)
    assert spend(dict(reversed(named.items())), budget) == found
    assert sum(option.nbytes for option in found.values()) <= budget
    # What Lagrange leaves open is at most one step of one tensor.
    best = min(sum(option.loss for option in plan) for plan in fitting)
    step = max(max(o.loss for o in menu) - min(o.loss for o in menu) for menu in named.values())
    assert sum(option.loss for option in found.values()) <= best + step + 1e-9


# Tokens that are sent to other experts, of which the losses know nothing, weigh less beside a coarse grid's errors.
@pytest.mark.parametrize(
    ("changes", "kind_of_grid"),
    [({}, "Q5_0"), ({"tie_word_embeddings": False}, "Q5_0"), (SPARSE, "Q4_0")],
    ids=["tied", "untied", "moe"],
)
def test_losses_are_the_divergence_of_the_quantized_model(
    make_checkpoint: Callable[..., Path], changes: dict, kind_of_grid: str
) -> None:
    checkpoint = Checkpoint(make_checkpoint(**changes))
    windows = np.random.default_rng(0).integers(0, 320, (16, 64)).astype(np.int32)
    grid = gguf_grid(kind_of_grid)
    losses = measure_losses(
        checkpoint,
        lambda info: [grid] if info.role in ("linear", "embedding", "head") else [],
        windows,
        RECIPE,
    )
    whole, model = load_model(checkpoint), load_model(checkpoint)
    tokens = torch.from_numpy(windows).long()
    for kind in ("v_proj", "down_proj", "lm_head" if "tie_word_embeddings" in changes else "embed_tokens"):
        weights = model.state_dict()
        for layer in gptq_layers(
            checkpoint, lambda info, k=kind: grid if k in info.name else None, windows, RECIPE
        ):
            for name, tensor in layer.tensors.items():
                weights[name].copy_(torch.from_numpy(np.asarray(tensor.decode())))
        with torch.no_grad():
            expected, found = (torch.log_softmax(m(tokens).double(), -1) for m in (whole, model))
        measured = float((expected.exp() * (expected - found)).sum(-1).mean())
        predicted = math.fsum(loss[kind_of_grid] for name, loss in losses.items() if kind in name)
        assert 0.5 < predicted / measured < 2, kind
        model.load_state_dict(whole.state_dict())


def test_more_bits_lose_less(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(make_checkpoint())
    windows = np.random.default_rng(0).integers(0, 320, (4, 64)).astype(np.int32)
    grids = [gguf_grid(name) for name in ("Q4_0", "Q5_0", "Q8_0")]
    losses = measure_losses(checkpoint, lambda info: grids if info.role == "linear" else [], windows, RECIPE)
    assert len(losses) == 14
    for loss in losses.values():
        assert loss["Q4_0"] > loss["Q5_0"] > loss["Q8_0"] > 0
    assert losses == measure_losses(
        checkpoint, lambda info: grids if info.role == "linear" else [], windows, RECIPE
    )
