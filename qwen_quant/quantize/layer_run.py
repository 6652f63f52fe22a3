"""One decoder layer on its way through the quantizer.

Each layer's later inputs see its earlier parts already quantized ("true sequential"). Linear layers that read the
same activations share one Hessian and one solve. Experts are read, solved, run and forgotten a few at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import CalibrationError
from qwen_quant.grids.base import AffineGrid, QuantizedTensor
from qwen_quant.model import DecoderLayer, load_expert, load_layer
from qwen_quant.model.mlp import MLP, SparseMLP
from qwen_quant.moe import PROJECTIONS
from qwen_quant.quantize.calibration import Calibration
from qwen_quant.quantize.experts import ExpertInputs, groups_of_experts, shrunk
from qwen_quant.quantize.gptq import Solution, solve, solve_stack
from qwen_quant.quantize.heap import give_back_memory
from qwen_quant.quantize.inputs import Inputs, batches_of
from qwen_quant.quantize.layer import LinearReport, QuantizedLayer, Stopwatch, to_numpy, to_torch
from qwen_quant.quantize.ranks import each_on_its_rank, own_part
from qwen_quant.quantize.recipe import GridChoice, Recipe
from qwen_quant.spec import TensorInfo

Solved = tuple[QuantizedTensor, LinearReport]


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
        _add(batches, contexts.outputs(layer.attention_output))
        self.watch.lap("calibrate")

        if isinstance(layer.mlp, SparseMLP):
            parts = batches_of(hidden, routed=True)
            outputs = self._through_experts(layer.mlp, parts, self._solved_groups)
            if layer.mlp.moe.shared_expert_intermediate_size is not None:
                shared = tuple(f"mlp.shared_expert.{name}" for name in PROJECTIONS)
                self._solve_mlp(layer.mlp.shared_expert, shared, batches, keep=False)
            self._finish_sparse(layer.mlp, parts, outputs)
        else:
            gated = self._solve_mlp(layer.mlp, names.mlp, batches, self.keep_activations)
            _add(batches, gated.outputs(self._linear(names.mlp[-1])))
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
        ready: Callable[[ExpertInputs, list[range]], Iterator[range]],
    ) -> dict[int, Tensor]:
        """What the experts make of those `batches` that belong to this rank, by number.

        A few experts at a time, as `ready` brings them into memory, are run and forgotten.
        """
        inputs = ExpertInputs(block, f"{self.prefix}mlp.", batches, self.layer.post_attention_layernorm)
        outputs = {number: torch.zeros_like(batches[number]) for number in own_part(range(len(batches)))}
        for experts in ready(inputs, list(groups_of_experts(block.moe, self.spec.hidden_size))):
            inputs.add_outputs(experts, outputs)
            for expert in experts:
                block.experts[expert].to("meta")
            give_back_memory()
        return outputs

    def _read(self, experts: range) -> None:
        self.watch.lap("calibrate")
        for expert in experts:
            load_expert(self.layer, self.checkpoint, self.index, expert, self.device)
        self.watch.lap("read")

    def _finish_sparse(
        self, block: SparseMLP, batches: tuple[Tensor, ...], outputs: Mapping[int, Tensor]
    ) -> None:
        """Add the experts' `outputs` and the shared expert's to `batches`."""

        def finished(number: int) -> Tensor:
            out = outputs[number]
            block.add_shared(out.flatten(0, -2), self.layer.mlp_input(batches[number]).flatten(0, -2))
            return out

        _add(batches, each_on_its_rank(finished, range(len(batches))))

    def _solved_groups(self, inputs: ExpertInputs, groups: list[range]) -> Iterator[range]:
        """Experts read and quantized; each group by one rank."""

        def solved(experts: range) -> list[Any]:
            self._read(experts)
            return self._solve_experts(inputs, experts)

        for experts, found in zip(groups, each_on_its_rank(solved, groups), strict=True):
            elsewhere = self._linear(f"mlp.experts.{experts[0]}.{PROJECTIONS[0]}").weight.is_meta
            if elsewhere:
                self._read(experts)
            self._take(found, elsewhere)
            yield experts

    def _take(self, found: list[Any], elsewhere: bool) -> None:
        """Keep what was solved, on this rank or `elsewhere`."""
        for tensor, report in found:
            if elsewhere:
                self._put(report.name, tensor)
            self.result.tensors[report.name] = tensor
            self.result.reports.append(report)

    def _solve_experts(self, inputs: ExpertInputs, experts: range) -> list[Any]:
        """Quantize some experts, their gate and up before their down."""
        moments = inputs.input_moments(experts)
        found = self._quantize_experts(experts, PROJECTIONS[:2], moments, lambda expert: inputs.pooled)
        moments = inputs.gated_moments(experts)
        return found + self._quantize_experts(experts, PROJECTIONS[2:], moments, inputs.pooled_gated)

    def replay(self, kept: QuantizedLayer, hidden: Tensor, table: tuple[Tensor, Tensor]) -> None:
        """Carry `hidden` through the layer with weights quantized before, by the very steps of `solve_all`."""
        layer, batches = self.layer, batches_of(hidden)

        def restore(experts: Sequence[int]) -> None:
            for name, tensor in kept.tensors.items():
                if self.infos[name].expert in experts:
                    self._put(name, tensor)

        def restored_groups(inputs: ExpertInputs, groups: list[range]) -> Iterator[range]:
            for experts in groups:
                self._read(experts)
                restore(experts)
                yield experts

        restore([-1])
        contexts = Inputs(lambda part: self._context(part, table), batches, keep=False)
        _add(batches, contexts.outputs(layer.attention_output))
        if isinstance(layer.mlp, SparseMLP):
            parts = batches_of(hidden, routed=True)
            self._finish_sparse(layer.mlp, parts, self._through_experts(layer.mlp, parts, restored_groups))
            return
        _add(batches, Inputs(layer.mlp_input, batches, keep=False).outputs(layer.mlp))

    def _context(self, part: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        return self.layer.attend(self.layer.attention_input(part), table)

    def _linear(self, name: str) -> nn.Linear:
        module = self.layer.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def _moments(self, stage: tuple[str, ...], inputs: Iterable[Tensor]) -> Calibration:
        """The second moments of what the stage's linears read."""
        where = self.prefix + stage[0]
        moments = Calibration(self._linear(stage[0]).in_features, where, self.device, shared=True)
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
        found = [self._solved(*pair, moments.n_tokens) for pair in zip(grids, solutions, strict=True)]
        self._take(found, elsewhere=False)
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
    ) -> list[Any]:
        """Solve the same projections of several experts as one stack."""
        self.watch.lap("calibrate")
        # An expert's tensors have the same grids as every other's: a grid is chosen for a shape and a name.
        grids = self._grids_of(tuple(f"mlp.experts.{experts[0]}.{p}" for p in projections))
        if not grids:
            return []
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
        found = [
            self._solved(f"mlp.experts.{e}.{projection}", solution, own.n_tokens, share)
            for e, own, share, solutions in zip(experts, moments, shares, solved, strict=True)
            for projection, solution in zip(chosen, solutions, strict=True)
        ]
        self.watch.lap("solve")
        return found

    def _solved(self, name: str, solution: Solution, tokens: int, pooled: float = 0.0) -> Solved:
        """A solution in place of the weight it was made from."""
        self._linear(name).weight.data = solution.tensor.decode()
        report = LinearReport.of(f"{self.prefix}{name}.weight", solution, tokens, pooled)
        return to_numpy(solution.tensor), report

    def _put(self, name: str, tensor: QuantizedTensor) -> None:
        """Replace weight `name` by what was quantized before or elsewhere."""
        module = self._linear(name.removeprefix(self.prefix).removesuffix(".weight"))
        module.weight.data = to_torch(tensor, self.device).decode()


def _add(batches: tuple[Tensor, ...], outputs: Iterable[Tensor]) -> None:
    for part, output in zip(batches, outputs, strict=True):
        part += output
