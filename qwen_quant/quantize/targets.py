"""What a decoder layer's linears should give: not what they make of their inputs, which the quantized layers before
have changed already, but what they give in the model that is not quantized.

GPTQ's target for inputs x̂ is W x̂. In full precision the inputs are x and the outputs W x; and what o and down give is
added to hidden states h, where quantizing has made ĥ. So q, k, v, gate and up lack W (x - x̂), and o and down lack
W (x - x̂) + h - ĥ. The weights that come nearest to what W gives and lacks are

    W' = argmin E|W' x̂ - (W x̂ + lack)|² + |(W' - W) Λ^½|² = W + E[lack x̂ᵀ] (H + Λ)⁻¹

and these are rounded instead of W. Without the hidden states' part it is the objective of GPTAQ (Li et al. 2025,
arXiv:2504.02692), solved before rounding instead of column by column.

It takes the same tokens' hidden states in full precision, which go through the layer beside the others. Half of the
calibration windows do: all of them would gain a third more for twice the time (docs/quantization.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qwen_quant.model import DecoderLayer, new_layer
from qwen_quant.model.mlp import MLP
from qwen_quant.quantize import scratch
from qwen_quant.quantize.inputs import OfBatch, batches_of, each_batch
from qwen_quant.spec import ModelSpec

Batches = tuple[Tensor, ...]
Table = tuple[Tensor, Tensor]
# Λ as a share of the geometric mean of an input's own second moment and the mean of all: a share of its own holds every
# input back alike, one of the mean only the small ones. Little of what is lacking follows from a layer's inputs, the
# rest is noise: with the solver's 0.01 more of that is learned, and less is gained on other text
# (docs/quantization.md).
DAMPING = 0.1
LEAST = 1e-4  # and of the mean alone, for inputs that are always 0
Aim = Callable[[Tensor, Tensor], Tensor]  # from a weight [N, K] and its `change` [M, K] to what is rounded


def told(lack: Tensor, hessian: Tensor) -> Tensor:
    """E[y xᵀ] (H + Λ)⁻¹ [M, K]: what inputs x tell of y, given `lack` = E[y xᵀ] [M, K] and H = E[x xᵀ] [K, K]. Nothing
    where H cannot be factored (see factor.py)."""
    damped = hessian.clone()
    damped.diagonal().add_(damping(hessian))
    info = torch.empty((), dtype=torch.int32, device=damped.device)
    torch.linalg.cholesky_ex(damped, out=(damped, info))  # in its place
    return torch.zeros_like(lack) if info else torch.cholesky_solve(lack.T, damped).T


def damping(hessian: Tensor) -> Tensor:
    """The diagonal of Λ [K], given H [K, K]."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    return DAMPING * (diagonal * mean).sqrt() + LEAST * mean


def at_inputs(weight: Tensor, change: Tensor) -> Tensor:
    """The weights [N, K] that make up for what inputs lack, given what these tell of it, `change` [K, K]."""
    return weight + weight @ change


def at_outputs(weight: Tensor, change: Tensor) -> Tensor:
    """The weights [N, K] that make up for what outputs lack, given what inputs tell of it, `change` [N, K]."""
    return weight + change


def half_of(samples: int) -> int:
    """The windows that pass in full precision too."""
    return -(-samples // 2)


def lacking(read: Callable[[Tensor], Tensor], exact: Batches, number: int, x: Tensor) -> Tensor | None:
    """By how much inputs x of a batch differ from what `read` gives in full precision; None of a batch that does not
    pass in it."""
    if number >= len(exact):
        return None
    own = read(exact[number])
    return own - x[: len(own)]


class Reference:
    """A decoder layer in full precision, and the hidden states [samples, seq, hidden] that it carries along, in place:
    those of the first windows.

    Its weights are those of `layer` now; giving `layer` others leaves them as they are. Batches have the numbers of
    `batches_of`, and each is carried by its rank. What is lacking is known of these batches, of the last perhaps only
    for its first windows. Of o and down it comes with what is there already, W x̂: for all tokens together that is W H,
    which takes fewer operations (`Calibration.less`).
    """

    def __init__(
        self, spec: ModelSpec, index: int, layer: DecoderLayer, hidden: Tensor, table: Table
    ) -> None:
        self._names, self._table = spec.names, table
        self._layer = _alike(spec, index, layer)
        self._batches = batches_of(hidden)

    def attention_lack(self, number: int, x: Tensor) -> Tensor | None:
        """By how much inputs x of q, k and v differ from those in full precision."""
        return lacking(self._layer.attention_input, self._batches, number, x)

    def mlp_lack(self, number: int, x: Tensor) -> Tensor | None:
        """The same of gate and up."""
        return lacking(self._layer.mlp_input, self._batches, number, x)

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches)

    def after_attention(self, hidden: Batches) -> OfBatch:
        """What o should give with the inputs of a batch, [..., hidden], before it is added to `hidden`: W x + h - ĥ;
        carries the batch past it."""

        def sought(number: int, x: Tensor) -> Tensor | None:
            if number >= len(self):
                return None
            own = self._layer.attend(self._layer.attention_input(self._batches[number]), self._table)
            return self._added(number, self._names.output, own, hidden)

        return sought

    def after_mlp(self, hidden: Batches) -> OfBatch:
        """The same of down."""
        mlp = self._layer.mlp
        assert isinstance(mlp, MLP)

        def sought(number: int, x: Tensor) -> Tensor | None:
            if number >= len(self):
                return None
            own = mlp.gated(self._layer.mlp_input(self._batches[number]))
            return self._added(number, self._names.mlp[-1], own, hidden)

        return sought

    def _added(self, number: int, name: str, own: Tensor, hidden: Batches) -> Tensor:
        linear, batch = self._layer.get_submodule(name), self._batches[number]
        assert isinstance(linear, nn.Linear)
        batch.add_(linear(own))
        sought = batch - hidden[number][: len(batch)]
        return sought if linear.bias is None else sought.sub_(linear.bias)

    def passed(self, *names: str) -> None:
        """All batches are past the linears of these names: let their weights go, and all ranks know all batches."""
        for name in names:
            self._layer.get_submodule(name).to("meta")
        found = each_batch(lambda number: self._batches[number], range(len(self)))
        for batch, carried in zip(self._batches, found, strict=True):
            if carried is not batch:
                batch.copy_(carried)
                scratch.let_go()


def _alike(spec: ModelSpec, index: int, layer: DecoderLayer) -> DecoderLayer:
    """A layer of its own around the same tensors."""
    with torch.device("meta"):
        copy = new_layer(spec, index)
    copy.load_state_dict(layer.state_dict(), assign=True)
    return copy.requires_grad_(False)
