"""Quantizing what lies outside the decoder layers: the embedding, and the head once all layers are solved.

The head is a linear layer whose inputs are the final norm's outputs. A tied embedding is one too; but its rows are
looked up as well, where every error counts for itself. So its Hessian is mixed with a multiple of the identity. An
embedding alone has no Hessian: its scales are searched with all columns alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.grids.base import AffineGrid, QuantizedTensor, Scales
from qwen_quant.model.transformer import RMSNorm
from qwen_quant.quantize.calibration import Calibration
from qwen_quant.quantize.gptq import Input, Solution, solve_input
from qwen_quant.quantize.inputs import Inputs, batches_of
from qwen_quant.quantize.layer import LinearReport, QuantizedLayer, Stopwatch
from qwen_quant.quantize.ranks import each_on_its_rank
from qwen_quant.quantize.recipe import GridChoice, Recipe
from qwen_quant.quantize.targets import at_inputs, lacking, told
from qwen_quant.spec import TensorInfo

OUTER = -1  # the number of what lies outside the layers
# Of the Hessian's mean diagonal, added for the looked-up rows of a tied embedding: of 0.01 … 10 this lost least on
# the bundled model (Q4_K and Q6_K).
TIED_SHARE = 1.0


def outer_grids(checkpoint: Checkpoint, grids: GridChoice) -> dict[str, AffineGrid]:
    """The tensors outside the layers that are quantized, and their grids."""
    found = {info.name: grids(info) for info in checkpoint.spec.outer_tensors()}
    return {name: grid for name, grid in found.items() if grid is not None}


def solve_outer(
    checkpoint: Checkpoint, grids: GridChoice, recipe: Recipe, hidden: Tensor, exact: Tensor | None = None
) -> QuantizedLayer:
    """Quantize embedding and head; `hidden` [samples, seq, hidden] came out of the last layer, and `exact` in full
    precision, the first of them: where it is known the head aims at its logits (targets.py)."""
    watch, result = Stopwatch(), QuantizedLayer(OUTER)
    spec, chosen = checkpoint.spec, outer_grids(checkpoint, grids)
    for info in spec.outer_tensors():
        if info.name not in chosen:
            continue
        if info.role == "head" or spec.tie_word_embeddings:
            moments = final_moments(checkpoint, hidden, exact)
            watch.lap("calibrate")
            _solve_head(checkpoint, info, chosen[info.name], moments, recipe, result)
        else:
            _search_rows(checkpoint, info, chosen[info.name], result)
        watch.lap("solve")
    result.parts = watch.seconds
    result.seconds = sum(result.parts.values())
    return result


def final_moments(checkpoint: Checkpoint, hidden: Tensor, exact: Tensor | None = None) -> Calibration:
    """What the head reads, and what it lacks of that."""
    spec, name = checkpoint.spec, f"{checkpoint.spec.names.norm}.weight"
    norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps).to(hidden.device).requires_grad_(False)
    norm.weight.copy_(torch.from_numpy(checkpoint.read(name)))
    reference = batches_of(hidden if exact is None else exact)

    def lack(number: int, x: Tensor) -> Tensor | None:
        return lacking(norm, reference, number, x)

    moments = Calibration(spec.hidden_size, name, hidden.device, shared=True)
    for x, missing in Inputs(norm, batches_of(hidden), lack=None if exact is None else lack):
        moments.add(x, missing)
    return moments


def tied_hessian(hessian: Tensor) -> Tensor:
    """What a tied embedding is solved for [K, K], given its Hessian as a head."""
    mean = hessian.diagonal().mean()
    return hessian + TIED_SHARE * mean * torch.eye(len(hessian), device=hessian.device)


def _solve_head(
    checkpoint: Checkpoint,
    info: TensorInfo,
    grid: AffineGrid,
    moments: Calibration,
    recipe: Recipe,
    result: QuantizedLayer,
) -> None:
    """GPTQ of the head, in parts: rows are independent, and there are many."""
    hessian = moments.hessian
    if checkpoint.spec.tie_word_embeddings:
        hessian = tied_hessian(hessian)
    change = None if moments.lack is None else told(moments.lack, hessian)
    shared = Input.of(hessian[None], recipe.damp_percent)

    def solved(rows: slice) -> Solution:
        weight = torch.from_numpy(checkpoint.source.read(info.name, rows)).to(hessian.device)
        if change is not None:
            weight = at_inputs(weight, change)
        [[solution]] = solve_input([weight[None]], shared, [grid])
        return solution

    firsts: list[Solution] = []
    errors: list[tuple[Tensor, Tensor, Tensor]] = []

    def tensors() -> Iterator[QuantizedTensor]:
        for solution in each_on_its_rank(solved, checkpoint.source.pieces(info.name)):
            if not firsts:
                firsts.append(solution)
            errors.append((solution.cost, solution.rtn_cost, solution.size))
            yield solution.tensor

    joined = _joined(tensors(), info.shape[0])
    cost, rtn_cost, size = map(torch.cat, zip(*errors, strict=True))
    whole = replace(firsts[0], tensor=joined, cost=cost, rtn_cost=rtn_cost, size=size)
    result.tensors[info.name] = whole.tensor
    result.reports.append(LinearReport.of(info.name, whole, moments.n_tokens))


def _search_rows(checkpoint: Checkpoint, info: TensorInfo, grid: AffineGrid, result: QuantizedLayer) -> None:
    def searched(rows: slice) -> QuantizedTensor:
        weight = checkpoint.source.read(info.name, rows)
        return grid.searched_rounding(weight, np.ones(info.shape[1], dtype=np.float32))

    parts = each_on_its_rank(searched, checkpoint.source.pieces(info.name))
    result.tensors[info.name] = _joined(parts, info.shape[0])


def _joined(parts: Iterable[QuantizedTensor], n_rows: int) -> QuantizedTensor:
    """The same for all rows, in NumPy; memory holds one of `parts` beside it."""
    grid, whole, start = None, [], 0
    for part in parts:
        values = (part.codes, part.scales.scale, part.scales.offset)
        arrays = [x if isinstance(x, np.ndarray) else x.cpu().numpy() for x in values]
        if grid is None:
            grid, whole = part.grid, [np.empty((n_rows, x.shape[1]), x.dtype) for x in arrays]
        stop = start + len(arrays[0])
        for rows, array in zip(whole, arrays, strict=True):
            rows[start:stop] = array
        start = stop
    assert grid is not None and start == n_rows
    codes, scale, offset = whole
    return QuantizedTensor(grid, codes, Scales(scale, offset))
