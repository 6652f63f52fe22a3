"""One decoder layer on its way through the quantizer.

Each layer's later inputs see its earlier parts already quantized ("true sequential"). Linear layers that read the
same activations share one Hessian and one solve. Experts are read, solved, run and forgotten a few at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_quant.errors import CalibrationError
from qwen_quant.model.mlp import MLP, SparseMLP
from qwen_quant.moe import PROJECTIONS
from qwen_quant.quantize import scratch
from qwen_quant.quantize.calibration import Calibration
from qwen_quant.quantize.experts import ExpertInputs, groups_of_experts, shrunk
from qwen_quant.quantize.gptq import solve, solve_stack
from qwen_quant.quantize.heap import give_back_memory
from qwen_quant.quantize.inputs import Inputs, OfBatch, batches_of
from qwen_quant.quantize.layer import QuantizedLayer
from qwen_quant.quantize.layer_weights import LayerWeights
from qwen_quant.quantize.ranks import each_on_its_rank, own_part
from qwen_quant.quantize.targets import Aim, Reference, at_inputs, at_outputs, told

GroupsReady = Callable[[ExpertInputs, list[range]], Iterator[range]]  # brings groups of experts into memory


class LayerRun(LayerWeights):
    """The stages of one decoder layer, each: see the inputs, solve, put the quantized weights in place."""

    def solve_all(
        self, hidden: Tensor, table: tuple[Tensor, Tensor], exact: Tensor | None = None
    ) -> QuantizedLayer:
        """Quantize the layer and carry `hidden` [samples, seq, hidden] through it, in place.

        With `exact`, the first of the same hidden states in full precision, the linears aim at what they give there
        (targets.py), those of experts excepted; it is carried through the layer as it was.
        """
        layer, names, batches = self.layer, self.spec.names, batches_of(hidden)
        reference = None if exact is None else Reference(self.spec, self.index, layer, exact, table)

        lack: OfBatch | None = None if reference is None else reference.attention_lack
        inputs = Inputs(layer.attention_input, batches, lack=lack)
        self._quantize(names.qkv, self._moments(names.qkv, inputs), at_inputs)

        lack = None if reference is None else reference.after_attention(batches)
        lacking = 0 if reference is None else len(reference)
        contexts = Inputs(
            lambda part: self._context(part, table), batches, self.keep_activations, lack, lacking=lacking
        )
        moments = self._moments((names.output,), contexts, whole=True)
        if reference is not None:
            reference.passed(*names.qkv, names.output)
        self._quantize((names.output,), moments, at_outputs)
        del moments  # no small part of a layer's memory
        _add(batches, contexts.outputs(layer.attention_output))
        self._let_go(*names.qkv, names.output)
        self.watch.lap("calibrate")

        if isinstance(layer.mlp, SparseMLP):
            if exact is not None:
                self._pass_experts(layer.mlp, exact, self._plain_groups)
            parts = batches_of(hidden, routed=True)
            outputs = self._through_experts(layer.mlp, parts, self._solved_groups)
            if layer.mlp.moe.shared_expert_intermediate_size is not None:
                shared = tuple(f"mlp.shared_expert.{name}" for name in PROJECTIONS)
                self._solve_mlp(layer.mlp.shared_expert, shared, batches, keep=False)
            self._finish_sparse(layer.mlp, parts, outputs)
        else:
            gated = self._solve_mlp(layer.mlp, names.mlp, batches, self.keep_activations, reference)
            _add(batches, gated.outputs(self._linear(names.mlp[-1])))
        for batch in (*batches, *(() if exact is None else batches_of(exact))):
            if not torch.isfinite(batch.sum()):
                raise CalibrationError(
                    f"{self.prefix[:-1]}: outputs are not finite; the checkpoint is broken"
                )
            scratch.let_go()
        self.watch.lap("calibrate")
        return self.result

    def _solve_mlp(
        self,
        module: MLP,
        names: tuple[str, ...],
        batches: tuple[Tensor, ...],
        keep: bool,
        reference: Reference | None = None,
    ) -> Inputs:
        """Quantize a SwiGLU that every token passes; `names` are gate, up and down. Returns what down reads."""
        first, last = names[:2], names[2:]
        lack: OfBatch | None = None if reference is None else reference.mlp_lack
        inputs = Inputs(self.layer.mlp_input, batches, lack=lack)
        self._quantize(first, self._moments(first, inputs), at_inputs)
        lack = None if reference is None else reference.after_mlp(batches)
        lacking = 0 if reference is None else len(reference)
        gated = Inputs(self._gated(module), batches, keep, lack, lacking=lacking)
        moments = self._moments(last, gated, whole=True)
        if reference is not None:
            reference.passed(*names)
        if keep:
            self._let_go(*first)
        self._quantize(last, moments, at_outputs)
        return gated

    def _through_experts(
        self,
        block: SparseMLP,
        batches: tuple[Tensor, ...],
        ready: GroupsReady,
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

    def _pass_experts(
        self,
        block: SparseMLP,
        hidden: Tensor,
        ready: GroupsReady,
    ) -> None:
        """Carry `hidden` past the experts as `ready` brings them into memory, and the shared one as it is."""
        parts = batches_of(hidden, routed=True)
        self._finish_sparse(block, parts, self._through_experts(block, parts, ready))

    def _plain_groups(self, inputs: ExpertInputs, groups: list[range]) -> Iterator[range]:
        """Experts as they are in the checkpoint."""
        for experts in groups:
            self._read(experts)
            yield experts

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

    def _solve_experts(self, inputs: ExpertInputs, experts: range) -> list[Any]:
        """Quantize some experts, their gate and up before their down."""
        moments = inputs.input_moments(experts)
        found = self._quantize_experts(experts, PROJECTIONS[:2], moments, lambda expert: inputs.pooled)
        moments = inputs.gated_moments(experts)
        return found + self._quantize_experts(experts, PROJECTIONS[2:], moments, inputs.pooled_gated)

    def replay(
        self,
        kept: QuantizedLayer,
        hidden: Tensor,
        table: tuple[Tensor, Tensor],
        exact: Tensor | None = None,
    ) -> None:
        """Carry `hidden` through the layer with weights quantized before, by the very steps of `solve_all`; and
        `exact` through the layer as it was."""
        if exact is not None:
            self.carry(exact, table)

        def restore(experts: Sequence[int]) -> None:
            for name, tensor in kept.tensors.items():
                if self.infos[name].expert in experts:
                    self._put(name, tensor)

        def restored_groups(inputs: ExpertInputs, groups: list[range]) -> Iterator[range]:
            for experts in self._plain_groups(inputs, groups):
                restore(experts)
                yield experts

        restore([-1])
        self._carry(hidden, table, restored_groups, narrow=True)

    def carry(self, hidden: Tensor, table: tuple[Tensor, Tensor]) -> None:
        """Carry `hidden` through the layer as it is in the checkpoint."""
        self._carry(hidden, table, self._plain_groups, narrow=False)

    def _carry(self, hidden: Tensor, table: tuple[Tensor, Tensor], ready: GroupsReady, narrow: bool) -> None:
        """Carry `hidden` through the layer as it is now, its experts as they get `ready`."""
        layer, batches = self.layer, batches_of(hidden)
        contexts = Inputs(lambda part: self._context(part, table), batches, narrow=narrow)
        _add(batches, contexts.outputs(layer.attention_output))
        mlp = layer.mlp
        if isinstance(mlp, SparseMLP):
            self._pass_experts(mlp, hidden, ready)
        else:
            gated = Inputs(self._gated(mlp), batches, narrow=narrow)
            _add(batches, gated.outputs(self._linear(self.spec.names.mlp[-1])))

    def _gated(self, mlp: MLP) -> Callable[[Tensor], Tensor]:
        return lambda part: mlp.gated(self.layer.mlp_input(part))

    def _context(self, part: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        return self.layer.attend(self.layer.attention_input(part), table)

    def _moments(self, stage: tuple[str, ...], inputs: Inputs, whole: bool = False) -> Calibration:
        """The moments of what the stage's linears read. What these lack may come `whole`, what they give included."""
        linear = self._linear(stage[0])
        moments = Calibration(linear.in_features, self.prefix + stage[0], self.device, shared=True)
        rest = None  # of the last batch, of which nothing is known to be lacking
        for x, lack in inputs.lacking():
            assert lack is not None
            moments.add(x[: len(lack)], lack)
            rest = x[len(lack) :]
        if whole:
            moments.less(linear.weight)
        if rest is not None:
            moments.add(rest)
        for x, lack in inputs.others():
            moments.add(x, lack)
        return moments

    def _quantize(self, stage: tuple[str, ...], moments: Calibration, aim: Aim) -> None:
        """Solve the stage's linears together, with `aim` at what they lack where that is known."""
        self.watch.lap("calibrate")
        grids = self._grids_of(stage)
        if not grids:
            return
        give_back_memory()  # of the passes, whose tensors have other sizes than the solver's
        weights = [self._linear(name).weight.data for name in grids]
        if moments.lack is not None:
            change = told(moments.lack, moments.hessian)
            weights = [aim(weight, change) for weight in weights]
        solutions = solve(
            weights,
            moments.hessian,
            list(grids.values()),
            damp_percent=self.recipe.damp_percent,
            desc_act=self.recipe.desc_act,
            row_moments=self._row_moments(grids),
        )
        found = [self._solved(*pair, moments.n_tokens) for pair in zip(grids, solutions, strict=True)]
        self._take(found, elsewhere=False)
        give_back_memory()
        self.watch.lap("solve")

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


def _add(batches: tuple[Tensor, ...], outputs: Iterable[Tensor]) -> None:
    for part, output in zip(batches, outputs, strict=True):
        part += output
        scratch.let_go()
