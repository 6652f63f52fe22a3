"""Quantizing a checkpoint layer by layer: memory holds one decoder layer, its Hessians and the hidden states.

Each layer's later inputs see its earlier parts already quantized, and each layer sees the quantized layers
before it ("true sequential"). Linear layers that read the same activations share one Hessian and one solve.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import CalibrationError, CheckpointError, UsageError
from qwen_quant.grids.base import AffineGrid, QuantizedTensor, Scales
from qwen_quant.model import DecoderLayer, load_layer, new_rotary
from qwen_quant.model.transformer import MLP, SparseMLP
from qwen_quant.moe import PROJECTIONS
from qwen_quant.progress import progress
from qwen_quant.quantize.calibration import Calibration, fast_matmul
from qwen_quant.quantize.experts import ExpertInputs, groups_of_experts, shrunk
from qwen_quant.quantize.gptq import Solution, solve, solve_stack
from qwen_quant.quantize.layer import LinearReport, QuantizedLayer
from qwen_quant.quantize.recipe import GridChoice, Recipe
from qwen_quant.quantize.resume import LayerStore, fingerprint
from qwen_quant.spec import TensorInfo

TOKENS_AT_ONCE = 4096  # calibration tokens per forward pass: bounds activations beside the hidden states


def pick_device(device: str) -> torch.device:
    """The torch device of `--device`. Raises UsageError when it is not there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {device}: not available here ({reason}); use --device cpu") from None
    return torch.device(device)


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
                    result.tensors[info.name] = grid.plain_rounding(checkpoint.read(info.name))
            result.seconds = time.monotonic() - began
            yield result
            advance(1, f"layer {index}")


def gptq_layers(
    checkpoint: Checkpoint,
    grids: GridChoice,
    windows: np.ndarray,
    recipe: Recipe,
    store: LayerStore | None = None,
) -> Iterator[QuantizedLayer]:
    """Solve every chosen linear of every decoder layer with GPTQ, calibrated on windows [samples, seq_len].

    Finished layers are kept in `store`, and taken from it when it has them: the result is the same to the bit.
    Raises CalibrationError when `store` belongs to another run, or when activations are not finite.
    """
    spec = checkpoint.spec
    device = pick_device(recipe.device)
    if checkpoint.quantization is not None:
        raise CheckpointError(f"{checkpoint.folder}: is quantized already; start from the BF16 checkpoint")
    hidden = _embed(checkpoint, windows).to(device)  # [samples, seq, hidden]
    table = new_rotary(spec).to(device)(0, windows.shape[1])
    with progress("GPTQ", spec.num_hidden_layers) as advance, torch.no_grad():
        for index in range(spec.num_hidden_layers):
            began = time.monotonic()
            with fast_matmul():
                run = _LayerRun(checkpoint, index, grids, recipe, device)
                result = _stored_or_solved(run, store, hidden, table, began)
            yield result
            advance(1, f"layer {index}")


def _stored_or_solved(
    run: _LayerRun, store: LayerStore | None, hidden: Tensor, table: tuple[Tensor, Tensor], began: float
) -> QuantizedLayer:
    """The layer from `store` or solved now (and stored); `hidden` has passed through it afterwards."""
    marks = {} if store is None else fingerprint(hidden, run.layer, run.recipe_record())
    kept = None if store is None else store.load(run.result.layer, run.chosen_grids(), marks)
    if kept is not None:
        run.replay(kept, hidden, table)
        return kept
    result = run.solve_all(hidden, table)
    result.seconds = time.monotonic() - began
    if store is not None:
        store.save(result, marks)
    return result


def _embed(checkpoint: Checkpoint, windows: np.ndarray) -> Tensor:
    """Embeddings [samples, seq, hidden] float32 of token windows."""
    if windows.max() >= checkpoint.spec.vocab_size:
        raise CalibrationError(
            f"{checkpoint.folder}: the tokenizer gives id {windows.max()}, beyond vocab_size "
            f"{checkpoint.spec.vocab_size}; tokenizer and weights do not belong together"
        )
    used, where = np.unique(windows, return_inverse=True)
    rows = checkpoint.source.read_rows(f"{checkpoint.spec.names.embedding}.weight", used)
    return torch.from_numpy(rows[where.reshape(windows.shape)])


class _LayerRun:
    """The stages of one decoder layer, each: see the inputs, solve, put the quantized weights in place."""

    def __init__(
        self, checkpoint: Checkpoint, index: int, grids: GridChoice, recipe: Recipe, device: torch.device
    ) -> None:
        self.layer: DecoderLayer = load_layer(checkpoint, index, device)
        self.prefix = checkpoint.spec.names.layer(index)
        self.spec = checkpoint.spec
        self.infos: dict[str, TensorInfo] = {i.name: i for i in checkpoint.spec.layer_tensors(index)}
        self.grids, self.recipe, self.device = grids, recipe, device
        self.result = QuantizedLayer(index)

    def chosen_grids(self) -> dict[str, AffineGrid]:
        """The grid of each tensor of the layer that is quantized."""
        found = {name: self.grids(info) for name, info in self.infos.items()}
        return {name: grid for name, grid in found.items() if grid is not None}

    def recipe_record(self) -> dict[str, Any]:
        """What decides the result beside weights and data."""
        return self.recipe.record() | {name: grid.name for name, grid in self.chosen_grids().items()}

    def solve_all(self, hidden: Tensor, table: tuple[Tensor, Tensor]) -> QuantizedLayer:
        """Quantize the layer and carry `hidden` [samples, seq, hidden] through it, in place."""
        layer, names, batches = self.layer, self.spec.names, self._batches(hidden)

        moments = self._moments(names.qkv)
        for part in batches:
            moments.add(layer.attention_input(part))
        self._quantize(names.qkv, moments)

        moments = self._moments((names.output,))
        contexts = []
        for part in batches:
            contexts.append(self._context(part, table))
            moments.add(contexts[-1])
        self._quantize((names.output,), moments)

        for part in batches:
            part += layer.attention_output(contexts.pop(0))
        if isinstance(layer.mlp, SparseMLP):
            self._solve_experts(layer.mlp, batches)
            if self.spec.moe is not None and self.spec.moe.shared_expert_intermediate_size is not None:
                shared = tuple(f"mlp.shared_expert.{name}" for name in PROJECTIONS)
                self._solve_mlp(layer.mlp.shared_expert, shared, batches)
        else:
            self._solve_mlp(layer.mlp, names.mlp, batches)
        for part in batches:
            part += layer.mlp(layer.mlp_input(part))
        if not torch.isfinite(hidden.sum()):
            raise CalibrationError(f"{self.prefix[:-1]}: outputs are not finite; the checkpoint is broken")
        return self.result

    def _solve_mlp(self, module: MLP, names: tuple[str, ...], batches: tuple[Tensor, ...]) -> None:
        """Quantize a SwiGLU that every token passes; `names` are gate, up and down."""
        first, last = names[:2], names[2:]
        moments = self._moments(first)
        for part in batches:
            moments.add(self.layer.mlp_input(part))
        self._quantize(first, moments)
        # The gated activations are computed again for the outputs rather than kept: they are the widest of all.
        moments = self._moments(last)
        for part in batches:
            moments.add(module.gated(self.layer.mlp_input(part)))
        self._quantize(last, moments)

    def _solve_experts(self, block: SparseMLP, batches: tuple[Tensor, ...]) -> None:
        """Quantize the experts, a few at a time, their gate and up before their down."""
        inputs = ExpertInputs(block, f"{self.prefix}mlp.", batches, self.layer.post_attention_layernorm)
        for experts in groups_of_experts(block.moe, self.spec.hidden_size):
            found = inputs.input_moments(experts)
            self._quantize_experts(experts, PROJECTIONS[:2], found, lambda expert: inputs.pooled)
            found = inputs.gated_moments(experts)
            self._quantize_experts(experts, PROJECTIONS[2:], found, inputs.pooled_gated)

    def replay(self, kept: QuantizedLayer, hidden: Tensor, table: tuple[Tensor, Tensor]) -> None:
        """Carry `hidden` through the layer with weights quantized before, by the very steps of `solve_all`."""
        for name, tensor in kept.tensors.items():
            module = self._linear(name.removeprefix(self.prefix).removesuffix(".weight"))
            module.weight.data = _to_torch(tensor, self.device).decode()
        for part in self._batches(hidden):
            part += self.layer.attention_output(self._context(part, table))
            part += self.layer.mlp(self.layer.mlp_input(part))

    def _batches(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Views of `hidden` [samples, seq, hidden] for one forward pass each; writing to one writes to `hidden`."""
        return hidden.split(max(1, TOKENS_AT_ONCE // hidden.shape[1]))

    def _context(self, part: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        return self.layer.attend(self.layer.attention_input(part), table)

    def _linear(self, name: str) -> nn.Linear:
        module = self.layer.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def _moments(self, stage: tuple[str, ...]) -> Calibration:
        return Calibration(self._linear(stage[0]).in_features, self.prefix + stage[0], self.device)

    def _quantize(self, stage: tuple[str, ...], moments: Calibration) -> None:
        """Solve the stage's linears, one stacked solve for each distinct grid."""
        for grid, names in self._by_grid(stage):
            weights = [self._linear(name).weight.data for name in names]
            solutions = solve(
                weights,
                moments.hessian,
                grid,
                damp_percent=self.recipe.damp_percent,
                desc_act=self.recipe.desc_act,
            )
            for name, solution in zip(names, solutions, strict=True):
                self._keep(name, grid, solution, moments.n_tokens)

    def _by_grid(self, names: tuple[str, ...]) -> Iterable[tuple[AffineGrid, list[str]]]:
        """Each distinct grid and the linears on it."""
        found: dict[str, tuple[AffineGrid, list[str]]] = {}
        for name in names:
            grid = self.grids(self.infos[f"{self.prefix}{name}.weight"])
            if grid is not None:
                found.setdefault(grid.name, (grid, []))[1].append(name)
        return found.values()

    def _quantize_experts(
        self,
        experts: range,
        projections: tuple[str, ...],
        moments: list[Calibration],
        pooled: Callable[[int], Tensor],
    ) -> None:
        """Solve the same projections of several experts as one stack for each distinct grid."""
        mixed = [shrunk(own, expert, pooled) for expert, own in zip(experts, moments, strict=True)]
        hessian = torch.stack([matrix for matrix, _ in mixed])  # [E, K, K]
        # An expert's tensors have the same grids as every other's: a grid is chosen for a shape and a name.
        for grid, names in self._by_grid(tuple(f"mlp.experts.{experts[0]}.{p}" for p in projections)):
            chosen = [name.rpartition(".")[2] for name in names]
            solved = solve_stack(
                [
                    torch.stack([self._linear(f"mlp.experts.{e}.{p}").weight.data for e in experts])
                    for p in chosen
                ],
                hessian,
                grid,
                damp_percent=self.recipe.damp_percent,
                desc_act=self.recipe.desc_act,
            )
            for e, own, (_, share), solutions in zip(experts, moments, mixed, solved, strict=True):
                for projection, solution in zip(chosen, solutions, strict=True):
                    self._keep(f"mlp.experts.{e}.{projection}", grid, solution, own.n_tokens, share)

    def _keep(
        self, name: str, grid: AffineGrid, solution: Solution, tokens: int, pooled: float = 0.0
    ) -> None:
        full = f"{self.prefix}{name}.weight"
        self._linear(name).weight.data = solution.tensor.decode()
        self.result.tensors[full] = _to_numpy(solution.tensor)
        self.result.reports.append(
            LinearReport(
                full,
                grid.name,
                solution.error,
                solution.rtn_error,
                solution.damping,
                tokens,
                solution.fallback,
                pooled,
            )
        )


def _to_numpy(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same tensor with NumPy arrays of its own (stacked solves hand out views)."""

    def own(x: Tensor) -> np.ndarray:
        return x.cpu().numpy().copy()

    index = None if tensor.group_index is None else own(tensor.group_index)
    return QuantizedTensor(
        tensor.grid, own(tensor.codes), Scales(own(tensor.scales.scale), own(tensor.scales.offset)), index
    )


def _to_torch(tensor: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    """The inverse of `_to_numpy`, on `device`."""

    def move(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(device)

    index = None if tensor.group_index is None else move(tensor.group_index)
    return QuantizedTensor(
        tensor.grid, move(tensor.codes), Scales(move(tensor.scales.scale), move(tensor.scales.offset)), index
    )
