"""What each tensor loses on each grid of a menu, in nats of KL divergence, before anything is quantized.

A tensor's loss is Σ_n E[g_n²] (D H Dᵀ)_nn / 2: the solver's own error D for a sample of its rows, and the rows' Fisher
weights (gradients.py). Losses of tensors add up, as long as they are small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.grids.base import AffineGrid
from qwen_quant.model import new_rotary
from qwen_quant.progress import progress
from qwen_quant.quantize.calibration import Calibration, fast_matmul
from qwen_quant.quantize.experts import shrunk
from qwen_quant.quantize.gptq import Input, solve_input
from qwen_quant.quantize.gradients import Gradients, output_gradients
from qwen_quant.quantize.layer_run import LayerRun
from qwen_quant.quantize.outer import final_moments, tied_hessian
from qwen_quant.quantize.ranks import each_on_its_rank, joined
from qwen_quant.quantize.recipe import Recipe
from qwen_quant.quantize.resume import Fingerprint, LayerStore, Losses, fingerprint
from qwen_quant.quantize.stream import embedded, pick_device
from qwen_quant.quantize.targets import Aim
from qwen_quant.spec import TensorInfo

Menu = Callable[[TensorInfo], Sequence[AffineGrid]]  # the grids that a tensor may lie on

ROWS = 128  # of each matrix that are solved
GRADIENT_TOKENS = 4096
HESSIAN_TOKENS = 16384


def measure_losses(
    checkpoint: Checkpoint, menu: Menu, windows: np.ndarray, recipe: Recipe, store: LayerStore | None = None
) -> Losses:
    """The loss of every matrix for which `menu` has grids, calibrated on some of windows [samples, seq_len].

    They are kept in `store`, and taken from it when it has them. Raises CalibrationError when `store` belongs to
    another run, or when activations are not finite.
    """
    menus = {info.name: menu(info) for info in checkpoint.spec.tensors()}
    marks: Fingerprint = {}
    if store is not None:
        grids = {name: [grid.name for grid in mine] for name, mine in menus.items()}
        weights = ((name, part) for name in menus for part in checkpoint.source.raw_chunks(name))
        marks = fingerprint(torch.from_numpy(windows), weights, recipe.record() | grids)
        kept = store.load_losses(marks)
        if kept is not None:
            return kept
    with joined(_follow, checkpoint.folder, menus, windows, recipe):
        losses = _measured(checkpoint, menu, windows, recipe)
    if store is not None:
        store.save_losses(losses, marks)
    return losses


def _follow(
    folder: Path, menu: Mapping[str, Sequence[AffineGrid]], windows: np.ndarray, recipe: Recipe
) -> None:
    """The part of a rank that keeps nothing."""
    _measured(Checkpoint(folder), lambda info: menu.get(info.name, ()), windows, recipe)


def _measured(checkpoint: Checkpoint, menu: Menu, windows: np.ndarray, recipe: Recipe) -> Losses:
    """`measure_losses` as each rank walks through it."""
    spec, device = checkpoint.spec, pick_device(recipe.device)

    def first(tokens: int) -> Tensor:
        return embedded(checkpoint, windows[: max(1, tokens // windows.shape[1])]).to(device)

    losses: Losses = {}
    with fast_matmul():
        gradients = output_gradients(checkpoint, first(GRADIENT_TOKENS), recipe.seed)
        hidden = first(HESSIAN_TOKENS)
        table = new_rotary(spec).to(device)(0, hidden.shape[1])
        with torch.no_grad(), progress("losses", spec.num_hidden_layers) as advance:
            for index in range(spec.num_hidden_layers):
                run = _MeasuringRun(checkpoint, index, menu, gradients, recipe, device)
                run.solve_all(hidden, table)
                losses |= run.losses
                advance(1, f"layer {index}")
            losses |= _outer_losses(checkpoint, menu, gradients, windows, hidden, recipe)
    return losses


class _MeasuringRun(LayerRun):
    """Walks through a layer as quantizing it does, and leaves its weights as they are."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        index: int,
        menu: Menu,
        gradients: Gradients,
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        super().__init__(checkpoint, index, lambda info: None, recipe, device)
        self.menu, self.gradients = menu, gradients
        self.losses: Losses = {}

    def _quantize(self, stage: tuple[str, ...], moments: Calibration, aim: Aim) -> None:
        shared = Input.of(moments.hessian[None], self.recipe.damp_percent)
        for found in each_on_its_rank(lambda name: self._measure(name, shared), stage):
            self.losses |= found

    def _quantize_experts(
        self,
        experts: range,
        projections: tuple[str, ...],
        moments: list[Calibration],
        pooled: Callable[[int], Tensor],
    ) -> list[Any]:
        found = []
        for expert, own in zip(experts, moments, strict=True):
            hessian, _ = shrunk(own, expert, pooled)
            shared = Input.of(hessian[None], self.recipe.damp_percent)
            found += [self._measure(f"mlp.experts.{expert}.{p}", shared) for p in projections]
        return found

    def _take(self, found: list[Any], elsewhere: bool) -> None:
        for losses in found:
            self.losses |= losses

    def _measure(self, name: str, shared: Input) -> Losses:
        full = f"{self.prefix}{name}.weight"
        weights = self.gradients.rows.get(full)  # None for an expert that no token went to
        weight = self._linear(name).weight.data
        if weights is None:
            weights = torch.zeros(len(weight))
        return {full: _losses(weight, weights, shared, self.menu(self.infos[full]))}


def _losses(weight: Tensor, weights: Tensor, shared: Input, grids: Sequence[AffineGrid]) -> dict[str, float]:
    """The loss of `weight` [N, K] on each grid, from rows at equal distances; `weights` [N]: E[g²]."""
    rows = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight))).round().long().to(weight.device)
    found = {}
    for grid in grids:
        [[solution]] = solve_input([weight[rows][None]], shared, [grid])
        mean = (weights.to(weight.device)[rows] * solution.cost).mean()
        found[grid.name] = 0.5 * len(weight) * float(mean)
    return found


def _outer_losses(
    checkpoint: Checkpoint,
    menu: Menu,
    gradients: Gradients,
    windows: np.ndarray,
    hidden: Tensor,
    recipe: Recipe,
) -> Losses:
    """Of embedding and head; rows are drawn by how much they count, because few tokens make most of the text."""
    spec = checkpoint.spec
    losses: Losses = {}
    counts = np.bincount(windows.ravel(), minlength=spec.vocab_size) / windows.size  # [vocab]
    for info in spec.outer_tensors():
        grids = menu(info)
        if not grids:
            continue
        is_head = info.role == "head" or spec.tie_word_embeddings
        by_logit = gradients.rows[info.name].cpu().numpy() if is_head else np.zeros(spec.vocab_size)
        by_entry = counts * float(gradients.embedded.mean()) if info.role == "embedding" else 0 * counts
        share = by_logit / max(by_logit.sum(), 1e-30) + by_entry / max(by_entry.sum(), 1e-30)
        share /= share.sum()
        drawn = np.random.default_rng(recipe.seed).choice(spec.vocab_size, 4 * ROWS, p=share)
        rows, where = np.unique(drawn, return_inverse=True)
        weight = torch.from_numpy(checkpoint.source.read_rows(info.name, rows)).to(hidden.device)
        moments = final_moments(checkpoint, hidden).hessian
        hessian = tied_hessian(moments) if spec.tie_word_embeddings else moments
        shared = Input.of(hessian[None], recipe.damp_percent)
        losses[info.name] = {}
        for grid in grids:
            if is_head:
                [[solution]] = solve_input([weight[None]], shared, [grid])
                decoded = solution.tensor.decode()
            else:
                decoded = grid.searched_rounding(weight, torch.ones_like(weight[0])).decode()
            error = weight - decoded  # [rows, hidden]
            as_head = ((error @ moments) * error).sum(1).cpu().numpy()
            as_entry = error.square().sum(1).cpu().numpy()
            cost = (by_logit[rows] * as_head + by_entry[rows] * as_entry) / share[rows]
            losses[info.name][grid.name] = 0.5 * float(cost[where].mean())
    return losses
