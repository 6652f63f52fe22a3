"""Calibrating the experts of a sparse layer, a few at a time: memory is bounded whatever their number.

Each expert sees the tokens that the router sends to it. One that sees few has a poor Hessian; it is then shrunk
toward the pooled one of the layer, the moments over all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from qwen_quant.model.mlp import MLP, SparseMLP
from qwen_quant.moe import MoESpec
from qwen_quant.quantize import scratch
from qwen_quant.quantize.calibration import Calibration

# An expert is cold below this many tokens for each input: up to one token its Hessian is certainly singular, and
# its small eigenvalues are far off up to a few.
COLD = 2
FLOATS_AT_ONCE = 1 << 26  # Hessians and weights of the experts that are solved together


def shrunk(moments: Calibration, expert: int, pooled: Callable[[int], Tensor]) -> tuple[Tensor, float]:
    """The Hessian [K, K] of an expert and the share of `pooled(expert)` in it.

    The share falls evenly from all of it at no tokens to none at COLD * K tokens, where it is not asked for.
    """
    own = moments.n_tokens / (COLD * len(moments.hessian))
    if own >= 1:
        return moments.hessian, 0.0
    return own * moments.hessian + (1 - own) * pooled(expert), 1 - own


def groups_of_experts(moe: MoESpec, hidden_size: int) -> Iterator[range]:
    """The experts in order, as many together as fit in FLOATS_AT_ONCE."""
    each = hidden_size**2 + 6 * moe.moe_intermediate_size * hidden_size
    step = max(1, FLOATS_AT_ONCE // each)
    for start in range(0, moe.num_experts, step):
        yield range(start, min(start + step, moe.num_experts))


class ExpertInputs:
    """Which tokens go to which expert. `parts` deliver the inputs of the block, each [T, hidden], as often as
    asked: the router's choice is kept, the inputs are not."""

    def __init__(self, block: SparseMLP, prefix: str, parts: Sequence[Tensor], norm: torch.nn.Module) -> None:
        self.block, self.prefix = block, prefix
        self._parts, self._norm = parts, norm
        hidden_size = parts[0].shape[-1]
        pooled = Calibration(hidden_size, f"{prefix}gate", parts[0].device, shared=True)
        self._routes = []
        for tokens in self._inputs():
            pooled.add(tokens)
            self._routes.append(block.route(tokens))  # experts and weights, both [T, num_experts_per_tok]
        self.pooled = pooled.hessian

    def _inputs(self) -> Iterator[Tensor]:
        for part in self._parts:
            yield self._norm(part).flatten(0, -2)
            scratch.let_go()

    def _routed(
        self, experts: range, parts: Sequence[int] | None = None
    ) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
        """The tokens of `experts` in all parts or some: each time the number of the part, of the expert, its inputs
        [R, hidden], and which rows of the part they are and their weights, both [R]. Only these rows are normalised
        again."""
        for number in range(len(self._parts)) if parts is None else parts:
            hidden, (chosen, weights) = self._parts[number].flatten(0, -2), self._routes[number]
            for expert in experts:
                rows, ranks = torch.where(chosen == expert)
                if len(rows):
                    yield number, expert, self._norm(hidden[rows]), rows, weights[rows, ranks]
            scratch.let_go()

    def _expert(self, index: int) -> MLP:
        module = self.block.experts[index]
        assert isinstance(module, MLP)
        return module

    def input_moments(self, experts: range) -> list[Calibration]:
        """What gate_proj and up_proj of `experts` read."""
        found = self._new(experts, "gate_proj")
        for _, expert, tokens, _, _ in self._routed(experts):
            found[expert - experts.start].add(tokens)
        return found

    def gated_moments(self, experts: range) -> list[Calibration]:
        """What down_proj of `experts` reads."""
        found = self._new(experts, "down_proj")
        for _, expert, tokens, _, _ in self._routed(experts):
            found[expert - experts.start].add(self._expert(expert).gated(tokens))
        return found

    def add_outputs(self, experts: range, outputs: Mapping[int, Tensor]) -> None:
        """Add to `outputs`, shaped as the parts of these numbers, what `experts` make of the tokens that are routed
        to them."""
        for number, expert, tokens, rows, weights in self._routed(experts, list(outputs)):
            self.block.add_expert(outputs[number].flatten(0, -2), expert, tokens, rows, weights)

    def pooled_gated(self, expert: int) -> Tensor:
        """What down_proj of `expert` would read from the layer's first tokens, routed to it or not [K, K].

        The experts' intermediate dimensions have nothing in common, so their moments cannot be pooled.
        """
        size = self._expert(expert).down_proj.in_features
        [moments] = self._new(range(expert, expert + 1), "down_proj")
        for tokens in self._inputs():
            moments.add(self._expert(expert).gated(tokens[: COLD * size - moments.n_tokens]))
            if moments.n_tokens == COLD * size:
                break
        return moments.hessian

    def _new(self, experts: range, projection: str) -> list[Calibration]:
        size = getattr(self._expert(0), projection).in_features
        where = f"{self.prefix}experts"
        return [Calibration(size, f"{where}.{e}.{projection}", self.pooled.device) for e in experts]
