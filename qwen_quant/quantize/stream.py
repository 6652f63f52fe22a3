"""Quantizing a checkpoint layer by layer: memory holds one decoder layer, its Hessians and the hidden states.

Of a sparse layer it holds a few experts at a time. `plan.py` counts the bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import CalibrationError, CheckpointError, UsageError
from qwen_quant.grids.base import AffineGrid
from qwen_quant.model import new_rotary
from qwen_quant.progress import progress
from qwen_quant.quantize import scratch
from qwen_quant.quantize.calibration import fast_matmul
from qwen_quant.quantize.layer import QuantizedLayer
from qwen_quant.quantize.layer_run import LayerRun
from qwen_quant.quantize.layer_weights import recipe_record
from qwen_quant.quantize.outer import OUTER, outer_grids, solve_outer
from qwen_quant.quantize.ranks import device_here, joined, on_one_rank
from qwen_quant.quantize.recipe import GridChoice, Recipe
from qwen_quant.quantize.resume import Fingerprint, LayerStore, fingerprint
from qwen_quant.quantize.row_moments import RowMoments, gradient_windows
from qwen_quant.quantize.targets import half_of


def pick_device(device: str) -> torch.device:
    """The torch device of `--device`. Raises UsageError when it is not there."""
    device = device_here(device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {device}: not available here ({reason}); use --device cpu") from None
    found = torch.device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)  # where what other ranks send arrives
    return found


def require_full_precision(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a checkpoint that calibration cannot begin with."""
    if checkpoint.quantization is not None:
        raise CheckpointError(f"{checkpoint.folder}: is quantized already; start from the BF16 checkpoint")


def plain_layers(checkpoint: Checkpoint, grids: GridChoice) -> Iterator[QuantizedLayer]:
    """Round every chosen tensor of every decoder layer to nearest; no calibration, no model."""
    spec = checkpoint.spec
    with progress("rounding", spec.num_hidden_layers) as advance:
        for index in range(spec.num_hidden_layers):
            began = time.monotonic()
            result = QuantizedLayer(index)
            for info in spec.layer_tensors(index):
                grid = grids(info)
                if grid is not None:
                    result.tensors[info.name] = grid.uncalibrated(checkpoint.read(info.name))
            result.seconds = time.monotonic() - began
            yield result
            advance(1, f"layer {index}")


def gptq_layers(
    checkpoint: Checkpoint,
    grids: GridChoice,
    windows: np.ndarray,
    recipe: Recipe,
    store: LayerStore | None = None,
    keep_activations: bool = True,
    spill: Path | None = None,
) -> Iterator[QuantizedLayer]:
    """Solve every chosen linear of every decoder layer with GPTQ, calibrated on windows [samples, seq_len]; then
    what is chosen outside the layers, if anything is.

    Finished layers are kept in `store`, and taken from it when it has them: the result is the same to the bit. So
    it is without `keep_activations`, where attention and SwiGLU are computed twice instead of being kept for all
    windows, and with `spill`, a folder in which hidden states and activations lie in files (scratch.py).
    Raises ResourceError when they do not fit there, CalibrationError when `store` belongs to another run, or when
    activations are not finite.
    """
    require_full_precision(checkpoint)
    chosen = {info.name: grid for info in checkpoint.spec.tensors() if (grid := grids(info)) is not None}
    with joined(_follow, checkpoint.folder, chosen, windows, recipe, keep_activations, spill):
        yield from _layers(checkpoint, grids, windows, recipe, store, keep_activations, spill)


def _follow(
    folder: Path,
    grids: Mapping[str, AffineGrid],
    windows: np.ndarray,
    recipe: Recipe,
    keep_activations: bool,
    spill: Path | None,
) -> None:
    """The part of a rank that writes nothing."""
    layers = _layers(
        Checkpoint(folder), lambda info: grids.get(info.name), windows, recipe, None, keep_activations, spill
    )
    for layer in layers:
        layer.tensors.clear()


def _layers(
    checkpoint: Checkpoint,
    grids: GridChoice,
    windows: np.ndarray,
    recipe: Recipe,
    store: LayerStore | None,
    keep_activations: bool,
    spill: Path | None,
) -> Iterator[QuantizedLayer]:
    """`gptq_layers` as each rank walks through them; `store` is known to the first one only."""
    spec = checkpoint.spec
    device = pick_device(recipe.device)
    hidden = embedded(checkpoint, windows, spill).to(device)  # [samples, seq, hidden]
    exact = None  # the first of them in full precision
    if recipe.correct_targets:
        exact = scratch.copy(hidden[: half_of(len(windows))], spill)
    moments = None
    if recipe.output_aware:
        with fast_matmul():
            first = hidden[: gradient_windows(spec, *windows.shape)]
            moments = RowMoments.measured(checkpoint, first, recipe.seed, spill)
    table = new_rotary(spec).to(device)(0, windows.shape[1])

    def solved(index: int) -> QuantizedLayer:
        # The run and its weights are gone before the layer is handed on and before the next one is read.
        run = LayerRun(checkpoint, index, grids, recipe, device, keep_activations, moments)
        return _stored_or_solved(run, store, hidden, table, exact)

    outer = outer_grids(checkpoint, grids)
    with progress("GPTQ", spec.num_hidden_layers + bool(outer)) as advance, torch.no_grad():
        for index in range(spec.num_hidden_layers):
            with fast_matmul():
                result = solved(index)
            yield result
            advance(1, f"layer {index}")
        if outer:
            with fast_matmul():
                result = _stored_or_solved_outer(checkpoint, grids, recipe, store, hidden, exact)
            yield result
            advance(1, "embedding and head")


def _stored_or_solved(
    run: LayerRun,
    store: LayerStore | None,
    hidden: Tensor,
    table: tuple[Tensor, Tensor],
    exact: Tensor | None,
) -> QuantizedLayer:
    """The layer from `store` or solved now (and stored); the hidden states have passed through it afterwards."""
    marks: Fingerprint = {}

    def load() -> QuantizedLayer | None:
        if store is None:
            return None
        marks.update(fingerprint(hidden, run.weights(), run.recipe_record()))
        return store.load(run.result.layer, run.chosen_grids(), marks)

    kept = on_one_rank(load)
    if kept is not None:
        run.replay(kept, hidden, table, exact)
        return kept
    run.watch.lap("hash")
    result = run.solve_all(hidden, table, exact)
    result.parts = run.watch.seconds
    result.seconds = sum(result.parts.values())
    if store is not None:
        store.save(result, marks)
    return result


def _stored_or_solved_outer(
    checkpoint: Checkpoint,
    grids: GridChoice,
    recipe: Recipe,
    store: LayerStore | None,
    hidden: Tensor,
    exact: Tensor | None,
) -> QuantizedLayer:
    """The same for what lies outside the layers; the hidden states came out of the last one."""
    chosen = outer_grids(checkpoint, grids)
    marks: Fingerprint = {}

    def load() -> QuantizedLayer | None:
        if store is None:
            return None
        names = (*chosen, f"{checkpoint.spec.names.norm}.weight")
        weights = ((name, part) for name in names for part in checkpoint.source.raw_chunks(name))
        marks.update(fingerprint(hidden, weights, recipe_record(recipe, chosen)))
        return store.load(OUTER, chosen, marks)

    kept = on_one_rank(load)
    if kept is not None:
        return kept
    result = solve_outer(checkpoint, grids, recipe, hidden, exact)
    if store is not None:
        store.save(result, marks)
    return result


def embedded(checkpoint: Checkpoint, windows: np.ndarray, spill: Path | None = None) -> Tensor:
    """Embeddings [samples, seq, hidden] float32 of token windows; in a file in the folder `spill`, if one is given."""
    if windows.max() >= checkpoint.spec.vocab_size:
        raise CalibrationError(
            f"{checkpoint.folder}: the tokenizer gives id {windows.max()}, beyond vocab_size "
            f"{checkpoint.spec.vocab_size}; tokenizer and weights do not belong together"
        )
    found = scratch.empty((*windows.shape, checkpoint.spec.hidden_size), spill)
    first = 0  # of the rows at hand
    for rows in checkpoint.source.chunks(f"{checkpoint.spec.names.embedding}.weight"):
        for into, tokens in zip(found, windows, strict=True):
            here = np.flatnonzero((tokens >= first) & (tokens < first + len(rows)))
            into[torch.from_numpy(here)] = torch.from_numpy(rows[tokens[here] - first])
            scratch.let_go()
        first += len(rows)
    return found
