"""How much the model's predictions move with the outputs of its linear layers: Fisher information, layer by layer.

Change the output y of a linear layer by a small d at every token, and the KL divergence between the old and the new
predictions is E[(g·d)²] / 2, where g is the gradient of -log p(token) by y for tokens drawn from the model itself
(Amari 1998; Martens 2020, arXiv:1412.1193). With the outputs' gradients taken as uncorrelated that is
Σ_n E[g_n²] E[d_n²] / 2: one weight for each row of a matrix.

Memory holds one decoder layer and the hidden states of the windows at every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.model import DecoderLayer, load_layer, new_rotary
from qwen_quant.model.transformer import RMSNorm
from qwen_quant.names import HEAD
from qwen_quant.progress import progress
from qwen_quant.quantize.inputs import batches_of
from qwen_quant.quantize.ranks import each_on_its_rank, on_one_rank

POSITIONS = 128  # whose logits are computed at once


@dataclass
class Gradients:
    """E[g_n²] over tokens for each row of a weight [N] by its name, and of the hidden states that enter the first
    layer [hidden]. A token that an expert does not see counts as 0."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    embedded: Tensor = field(default_factory=lambda: torch.zeros(0))


def output_gradients(checkpoint: Checkpoint, hidden: Tensor, seed: int = 0) -> Gradients:
    """Fisher weights from embedded windows `hidden` [samples, seq, hidden]; drawing tokens begins with `seed`."""
    spec, device, tokens = checkpoint.spec, hidden.device, hidden.shape[0] * hidden.shape[1]
    table = new_rotary(spec).to(device)(0, hidden.shape[1])
    states = [hidden]
    with progress("sensitivity", 2 * spec.num_hidden_layers) as advance:
        for index in range(spec.num_hidden_layers):
            layer = load_layer(checkpoint, index, device)
            with torch.no_grad():
                passed = each_on_its_rank(partial(layer, table=table), batches_of(states[-1]))
                states.append(torch.cat(list(passed)))
            advance(1, f"layer {index}")
        found = Gradients()
        last = states.pop()
        # Draws follow one another, so one rank makes them all.
        gradient, found.rows[_head_name(checkpoint)] = on_one_rank(
            lambda: _through_head(checkpoint, last, seed)
        )
        for index in reversed(range(spec.num_hidden_layers)):
            layer = load_layer(checkpoint, index, device)
            gradient, squares = _through_layer(layer, states.pop(), gradient, table)
            prefix = spec.names.layer(index)
            found.rows |= {f"{prefix}{name}.weight": square / tokens for name, square in squares.items()}
            advance(1, f"layer {index}")
    found.embedded = gradient.square().mean((0, 1))
    return found


def _head_name(checkpoint: Checkpoint) -> str:
    spec = checkpoint.spec
    return f"{spec.names.embedding if spec.tie_word_embeddings else HEAD}.weight"


def _through_head(checkpoint: Checkpoint, hidden: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The gradient by the last layer's outputs [samples, seq, hidden], and E[g²] of the logits [vocab]."""
    spec, device = checkpoint.spec, hidden.device
    norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps).to(device).requires_grad_(False)
    norm.weight.copy_(torch.from_numpy(checkpoint.read(f"{spec.names.norm}.weight")))
    weight = torch.from_numpy(checkpoint.read(_head_name(checkpoint))).to(device)
    generator = torch.Generator().manual_seed(seed)
    gradient, square = torch.empty_like(hidden), torch.zeros(len(weight), device=device)
    flat, out = hidden.flatten(0, 1), gradient.flatten(0, 1)
    for start in range(0, len(flat), POSITIONS):
        rows = slice(start, start + POSITIONS)
        x = flat[rows].clone().requires_grad_()
        normed = norm(x)
        by_logit = torch.softmax(F.linear(normed.detach(), weight), dim=-1)  # [positions, vocab]
        drawn = torch.multinomial(by_logit.cpu(), 1, generator=generator).to(device)
        by_logit.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=by_logit.dtype))
        square += by_logit.square().sum(0)
        normed.backward(by_logit @ weight)
        assert x.grad is not None
        out[rows] = x.grad
    return gradient, square / len(flat)


def _through_layer(
    layer: DecoderLayer, hidden: Tensor, gradient: Tensor, table: tuple[Tensor, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """From the gradient by a layer's outputs that by its inputs `hidden`, and Σ g² over tokens of each linear's
    outputs [N]."""
    squares: dict[str, Tensor] = {}  # of one part

    def count(name: str, by_output: Tensor) -> None:
        squares[name] = by_output.flatten(0, -2).square().sum(0)

    def watch(name: str, module: torch.nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(partial(count, name))

    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(partial(watch, name))

    def back(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        part, by_output = pair
        squares.clear()
        x = part.clone().requires_grad_()
        with torch.enable_grad():
            layer(x, table).backward(by_output)
        assert x.grad is not None
        return x.grad, dict(squares)

    pairs = list(zip(batches_of(hidden), batches_of(gradient), strict=True))
    parts, total = [], dict[str, Tensor]()
    for part, found in each_on_its_rank(back, pairs):
        parts.append(part)
        for name, square in found.items():
            total[name] = total[name] + square if name in total else square
    return torch.cat(parts), total
