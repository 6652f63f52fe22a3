"""How much the model's predictions move with the outputs of its linear layers: Fisher information, layer by layer.

Change the output y of a linear layer by a small d at every token, and the KL divergence between the old and the new
predictions is E[(g·d)²] / 2, where g is the gradient of -log p(token) by y for tokens drawn from the model itself
(Amari 1998; Martens 2020, arXiv:1412.1193). With the outputs' gradients taken as uncorrelated that is
Σ_n E[g_n²] E[d_n²] / 2: one weight for each row of a matrix. row_moments.py keeps their correlations too.

Memory holds one decoder layer and the hidden states of the windows at every layer, unless these lie in files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import CalibrationError
from qwen_quant.model import DecoderLayer, load_layer, new_rotary
from qwen_quant.model.transformer import RMSNorm
from qwen_quant.names import HEAD
from qwen_quant.progress import progress
from qwen_quant.quantize import scratch
from qwen_quant.quantize.inputs import batches_of
from qwen_quant.quantize.ranks import each_on_its_rank, on_one_rank

Table = tuple[Tensor, Tensor]
POSITIONS = 128  # whose logits are computed at once


@dataclass
class Gradients:
    """E[g_n²] over tokens for each row of a weight [N] by its name, and of the hidden states that enter the first
    layer [hidden]. A token that an expert does not see counts as 0."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    embedded: Tensor = field(default_factory=lambda: torch.zeros(0))


class Watch(Protocol):
    """What is made of the gradients by linears' outputs: of a batch of tokens at a time, from the last layer to the
    first."""

    def measure(self, name: str, by_output: Tensor) -> Tensor | None:
        """What the ranks tell each other of a batch [T, N], of the linear `name` of a layer; None for nothing."""

    def count(self, weight: str, measured: Tensor) -> None:
        """Take in what was measured, of the weight of this name."""

    def layer_passed(self) -> None:
        """All batches of a layer were counted."""


class _Squares:
    """Σ g² over tokens of each row [N], by the weight's name."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def measure(self, name: str, by_output: Tensor) -> Tensor:
        return by_output.square().sum(0)

    def count(self, weight: str, measured: Tensor) -> None:
        self.sums[weight] = self.sums[weight] + measured if weight in self.sums else measured

    def layer_passed(self) -> None:
        pass


def output_gradients(checkpoint: Checkpoint, hidden: Tensor, seed: int = 0) -> Gradients:
    """Fisher weights from embedded windows `hidden` [samples, seq, hidden]; drawing tokens begins with `seed`."""
    squares, tokens = _Squares(), hidden.shape[0] * hidden.shape[1]
    gradient, by_logit = backward(checkpoint, hidden, squares, seed)
    rows = {name: total / tokens for name, total in squares.sums.items()}
    return Gradients({_head_name(checkpoint): by_logit} | rows, gradient.square().mean((0, 1)))


def backward(
    checkpoint: Checkpoint, hidden: Tensor, watch: Watch, seed: int = 0, folder: Path | None = None
) -> tuple[Tensor, Tensor]:
    """Take the gradient of -log p(drawn token) back through the model, from embedded windows `hidden` [samples, seq,
    hidden], and show it to `watch`; the hidden states of each layer lie in files in `folder`, where one is given.

    Returns the gradient by `hidden`, and E[g²] of the logits [vocab]. Raises CalibrationError when activations are not
    finite.
    """
    spec, device = checkpoint.spec, hidden.device
    table = new_rotary(spec).to(device)(0, hidden.shape[1])
    states = [hidden]
    with progress("gradients", 2 * spec.num_hidden_layers) as advance:
        for index in range(spec.num_hidden_layers):
            layer = load_layer(checkpoint, index, device)
            states.append(_passed(layer, states[-1], table, spec.names.layer(index), folder))
            advance(1, f"layer {index}")
        # Draws follow one another, so one rank makes them all.
        gradient, by_logit = on_one_rank(lambda: _through_head(checkpoint, states[-1], seed, device, folder))
        states.pop()
        for index in reversed(range(spec.num_hidden_layers)):
            layer = load_layer(checkpoint, index, device)
            _through_layer(layer, states.pop(), gradient, table, watch, spec.names.layer(index))
            watch.layer_passed()
            advance(1, f"layer {index}")
    return gradient, by_logit


def _passed(layer: DecoderLayer, hidden: Tensor, table: Table, prefix: str, folder: Path | None) -> Tensor:
    """`hidden` behind the layer whose names begin with `prefix`."""
    found = _like(hidden, folder)
    with torch.no_grad():
        passed = each_on_its_rank(lambda batch: layer(batch.to(table[0].device), table), batches_of(hidden))
        for into, batch in zip(batches_of(found), passed, strict=True):
            if not torch.isfinite(batch.sum()):
                raise CalibrationError(f"{prefix[:-1]}: outputs are not finite; the checkpoint is broken")
            into.copy_(batch)
            scratch.let_go()
    return found


def _like(x: Tensor, folder: Path | None) -> Tensor:
    """Any values, of the shape of x: in this machine's memory, or in a file in `folder`."""
    return scratch.empty(x.shape, folder, x.dtype)


def _head_name(checkpoint: Checkpoint) -> str:
    spec = checkpoint.spec
    return f"{spec.names.embedding if spec.tie_word_embeddings else HEAD}.weight"


def _through_head(
    checkpoint: Checkpoint, hidden: Tensor, seed: int, device: torch.device, folder: Path | None
) -> tuple[Tensor, Tensor]:
    """The gradient by the last layer's outputs [samples, seq, hidden], and E[g²] of the logits [vocab]."""
    spec = checkpoint.spec
    norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps).to(device).requires_grad_(False)
    norm.weight.copy_(torch.from_numpy(checkpoint.read(f"{spec.names.norm}.weight")))
    weight = torch.from_numpy(checkpoint.read(_head_name(checkpoint))).to(device)
    generator = torch.Generator().manual_seed(seed)
    gradient, square = _like(hidden, folder), torch.zeros(len(weight), device=device)
    flat, out = hidden.flatten(0, 1), gradient.flatten(0, 1)
    for start in range(0, len(flat), POSITIONS):
        rows = slice(start, start + POSITIONS)
        x = flat[rows].to(device, copy=True).requires_grad_()
        with torch.enable_grad():  # whatever mode an unfinished run left behind
            normed = norm(x)
        by_logit = torch.softmax(F.linear(normed.detach(), weight), dim=-1)  # [positions, vocab]
        drawn = torch.multinomial(by_logit.cpu(), 1, generator=generator).to(device)
        by_logit.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=by_logit.dtype))
        square += by_logit.square().sum(0)
        normed.backward(by_logit @ weight)
        assert x.grad is not None
        out[rows] = x.grad
        scratch.let_go(start // POSITIONS)
    return gradient, square / len(flat)


def _through_layer(
    layer: DecoderLayer,
    hidden: Tensor,
    gradient: Tensor,
    table: Table,
    watch: Watch,
    prefix: str,
) -> None:
    """Turn the gradient by a layer's outputs into that by its inputs `hidden`, in its place, and show `watch` that by
    each linear's outputs; `prefix` is that of the layer's names."""
    found: dict[str, Tensor] = {}  # of one batch

    def measure(name: str, by_output: Tensor) -> None:
        measured = watch.measure(name, by_output.flatten(0, -2))
        if measured is not None:
            found[name] = measured

    def see(name: str, module: torch.nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(partial(measure, name))

    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(partial(see, name))

    def back(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        batch, by_output = (part.to(table[0].device, copy=True) for part in pair)
        found.clear()
        x = batch.requires_grad_()
        with torch.enable_grad():
            layer(x, table).backward(by_output)
        assert x.grad is not None
        return x.grad, dict(found)

    pairs = list(zip(batches_of(hidden), batches_of(gradient), strict=True))
    for into, (batch, measured) in zip(batches_of(gradient), each_on_its_rank(back, pairs), strict=True):
        into.copy_(batch)
        for name, value in measured.items():
            watch.count(f"{prefix}{name}.weight", value)
        scratch.let_go()
