"""One decoder layer on its way through the quantizer.

Each layer's later inputs see its earlier parts already quantized ("true sequential"). Linear layers that read the
same activations share one Hessian and one solve. Experts are read, solved, run and forgotten a few at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import CalibrationError
from qwen_quant.grids.base import AffineGrid, QuantizedTensor, Scales
from qwen_quant.model import DecoderLayer, load_expert, load_layer
from qwen_quant.model.mlp import MLP, SparseMLP
from qwen_quant.moe import PROJECTIONS
from qwen_quant.quantize.calibration import Calibration
from qwen_quant.quantize.experts import ExpertInputs, groups_of_experts, shrunk
from qwen_quant.quantize.gptq import Solution, solve, solve_stack
from qwen_quant.quantize.heap import give_back_memory
from qwen_quant.quantize.inputs import Inputs
from qwen_quant.quantize.layer import LinearReport, QuantizedLayer, Stopwatch
from qwen_quant.quantize.recipe import GridChoice, Recipe
from qwen_quant.spec import TensorInfo

TOKENS_AT_ONCE = 1024  # calibration tokens per forward pass: bounds activations beside the hidden states


def batches_of(hidden: Tensor) -> tuple[Tensor, ...]:
    """Views of `hidden` [samples, seq, hidden] for one forward pass each; writing to one writes to `hidden`."""
    return hidden.split(max(1, TOKENS_AT_ONCE // hidden.shape[1]))


def recipe_record(recipe: Recipe, grids: Mapping[str, AffineGrid]) -> dict[str, Any]:
    """What decides a result beside weights and data: the recipe, and the grid of each tensor."""
    return recipe.record() | {name: grid.name for name, grid in grids.items()}


class LayerRun:
    """The stages of one decoder layer, each: see the inputs, solve, put the quantized weights in place."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        index: int,
        grids: GridChoice,
        recipe: Recipe,
        device: torch.device,
        keep_activations: bool = True,
    ) -> None:
        self.watch = Stopwatch()
        self.checkpoint, self.index = checkpoint, index
        self.layer: DecoderLayer = load_layer(checkpoint, index, device, experts=False)
        self.watch.lap("read")
        self.prefix = checkpoint.spec.names.layer(index)
        self.spec = checkpoint.spec
        self.infos: dict[str, TensorInfo] = {i.name: i for i in checkpoint.spec.layer_tensors(index)}
        self.grids, self.recipe, self.device = grids, recipe, device
        self.keep_activations = keep_activations
        self.result = QuantizedLayer(index)

    def chosen_grids(self) -> dict[str, AffineGrid]:
        """The grid of each tensor of the layer that is quantized."""
        found = {name: self.grids(info) for name, info in self.infos.items()}
        return {name: grid for name, grid in found.items() if grid is not None}

    def recipe_record(self) -> dict[str, Any]:
        """What decides the result beside weights and data."""
        return recipe_record(self.recipe, self.chosen_grids())

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """The layer's full-precision weights one by one; experts are not in memory yet and come from the files."""
        for name, value in sorted(self.layer.state_dict().items()):
            yield name, self.checkpoint.read(self.prefix + name) if value.is_meta else value.cpu().numpy()

    def solve_all(self, hidden: Tensor, table: tuple[Tensor, Tensor]) -> QuantizedLayer:
        """Quantize the layer and carry `hidden` [samples, seq, hidden] through it, in place."""
        layer, names, batches = self.layer, self.spec.names, batches_of(hidden)

        moments = self._moments(names.qkv, (layer.attention_input(part) for part in batches))
        self._quantize(names.qkv, moments)

        contexts = Inputs(lambda part: self._context(part, table), batches, self.keep_activations)
        self._quantize((names.output,), self._moments((names.output,), contexts))
        for part, context in zip(batches, contexts, strict=True):
            part += layer.attention_output(context)
        self.watch.lap("calibrate")

        if isinstance(layer.mlp, SparseMLP):
            outputs = self._through_experts(layer.mlp, batches, self._solve_experts)
            if layer.mlp.moe.shared_expert_intermediate_size is not None:
                shared = tuple(f"mlp.shared_expert.{name}" for name in PROJECTIONS)
                self._solve_mlp(layer.mlp.shared_expert, shared, batches, keep=False)
            self._finish_sparse(layer.mlp, batches, outputs)
        else:
            gated = self._solve_mlp(layer.mlp, names.mlp, batches, self.keep_activations)
            down = self._linear(names.mlp[-1])
            for part, x in zip(batches, gated, strict=True):
                part += down(x)
        if not torch.isfinite(hidden.sum()):
            raise CalibrationError(f"{self.prefix[:-1]}: outputs are not finite; the checkpoint is broken")
        self.watch.lap("calibrate")
        return self.result

    def _solve_mlp(
        self, module: MLP, names: tuple[str, ...], batches: tuple[Tensor, ...], keep: bool
    ) -> Inputs:
        """Quantize a SwiGLU that every token passes; `names` are gate, up and down. Returns what down reads."""
        first, last = names[:2], names[2:]
        self._quantize(first, self._moments(first, (self.layer.mlp_input(part) for part in batches)))
        gated = Inputs(lambda part: module.gated(self.layer.mlp_input(part)), batches, keep)
        self._quantize(last, self._moments(last, gated))
        return gated

    def _through_experts(
        self,
        block: SparseMLP,
        batches: tuple[Tensor, ...],
        prepare: Callable[[ExpertInputs, range], None],
    ) -> list[Tensor]:
        """What the experts make of `batches`: a few at a time are read, made ready by `prepare`, run and forgotten."""
        inputs = ExpertInputs(block, f"{self.prefix}mlp.", batches, self.layer.post_attention_layernorm)
        outputs = [torch.zeros_like(part) for part in batches]
        for experts in groups_of_experts(block.moe, self.spec.hidden_size):
            self.watch.lap("calibrate")
            for expert in experts:
                load_expert(self.layer, self.checkpoint, self.index, expert, self.device)
            self.watch.lap("read")
            prepare(inputs, experts)
            inputs.add_outputs(experts, outputs)
            for expert in experts:
                block.experts[expert].to("meta")
            give_back_memory()
        return outputs

    def _finish_sparse(self, block: SparseMLP, batches: tuple[Tensor, ...], outputs: list[Tensor]) -> None:
        """Add the experts' `outputs` and the shared expert's to `batches`."""
        for part, out in zip(batches, outputs, strict=True):
            block.add_shared(out.flatten(0, -2), self.layer.mlp_input(part).flatten(0, -2))
            part += out

    def _solve_experts(self, inputs: ExpertInputs, experts: range) -> None:
        """Quantize some experts, their gate and up before their down."""
        found = inputs.input_moments(experts)
        self._quantize_experts(experts, PROJECTIONS[:2], found, lambda expert: inputs.pooled)
        found = inputs.gated_moments(experts)
        self._quantize_experts(experts, PROJECTIONS[2:], found, inputs.pooled_gated)

    def replay(self, kept: QuantizedLayer, hidden: Tensor, table: tuple[Tensor, Tensor]) -> None:
        """Carry `hidden` through the layer with weights quantized before, by the very steps of `solve_all`."""
        layer, batches = self.layer, batches_of(hidden)

        def restore(expert: int) -> None:
            for name, tensor in kept.tensors.items():
                if self.infos[name].expert == expert:
                    module = self._linear(name.removeprefix(self.prefix).removesuffix(".weight"))
                    module.weight.data = _to_torch(tensor, self.device).decode()

        def restore_group(inputs: ExpertInputs, experts: range) -> None:
            for expert in experts:
                restore(expert)

        restore(-1)
        for part in batches:
            part += layer.attention_output(self._context(part, table))
        if isinstance(layer.mlp, SparseMLP):
            self._finish_sparse(layer.mlp, batches, self._through_experts(layer.mlp, batches, restore_group))
            return
        for part in batches:
            part += layer.mlp(layer.mlp_input(part))

    def _context(self, part: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        return self.layer.attend(self.layer.attention_input(part), table)

    def _linear(self, name: str) -> nn.Linear:
        module = self.layer.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def _moments(self, stage: tuple[str, ...], inputs: Iterable[Tensor]) -> Calibration:
        """The second moments of what the stage's linears read."""
        moments = Calibration(self._linear(stage[0]).in_features, self.prefix + stage[0], self.device)
        for x in inputs:
            moments.add(x)
        return moments

    def _quantize(self, stage: tuple[str, ...], moments: Calibration) -> None:
        """Solve the stage's linears together."""
        self.watch.lap("calibrate")
        grids = self._grids_of(stage)
        if not grids:
            return
        give_back_memory()  # of the passes, whose tensors have other sizes than the solver's
        solutions = solve(
            [self._linear(name).weight.data for name in grids],
            moments.hessian,
            list(grids.values()),
            damp_percent=self.recipe.damp_percent,
            desc_act=self.recipe.desc_act,
        )
        for name, solution in zip(grids, solutions, strict=True):
            self._keep(name, solution, moments.n_tokens)
        give_back_memory()
        self.watch.lap("solve")

    def _grids_of(self, names: tuple[str, ...]) -> dict[str, AffineGrid]:
        """The linears of `names` that are quantized, and their grids."""
        found = {name: self.grids(self.infos[f"{self.prefix}{name}.weight"]) for name in names}
        return {name: grid for name, grid in found.items() if grid is not None}

    def _quantize_experts(
        self,
        experts: range,
        projections: tuple[str, ...],
        moments: list[Calibration],
        pooled: Callable[[int], Tensor],
    ) -> None:
        """Solve the same projections of several experts as one stack."""
        self.watch.lap("calibrate")
        # An expert's tensors have the same grids as every other's: a grid is chosen for a shape and a name.
        grids = self._grids_of(tuple(f"mlp.experts.{experts[0]}.{p}" for p in projections))
        if not grids:
            return
        size = self._linear(f"mlp.experts.{experts[0]}.{projections[0]}").in_features
        hessian = torch.empty(len(experts), size, size, device=self.device)  # [E, K, K]
        shares = []
        for matrix, expert, own in zip(hessian, experts, moments, strict=True):
            mixed, share = shrunk(own, expert, pooled)
            matrix.copy_(mixed)
            shares.append(share)
        chosen = [name.rpartition(".")[2] for name in grids]
        solved = solve_stack(
            [
                torch.stack([self._linear(f"mlp.experts.{e}.{p}").weight.data for e in experts])
                for p in chosen
            ],
            hessian,
            list(grids.values()),
            damp_percent=self.recipe.damp_percent,
            desc_act=self.recipe.desc_act,
        )
        for e, own, share, solutions in zip(experts, moments, shares, solved, strict=True):
            for projection, solution in zip(chosen, solutions, strict=True):
                self._keep(f"mlp.experts.{e}.{projection}", solution, own.n_tokens, share)
        self.watch.lap("solve")

    def _keep(self, name: str, solution: Solution, tokens: int, pooled: float = 0.0) -> None:
        full = f"{self.prefix}{name}.weight"
        self._linear(name).weight.data = solution.tensor.decode()
        self.result.tensors[full] = _to_numpy(solution.tensor)
        self.result.reports.append(LinearReport.of(full, solution, tokens, pooled))


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
