"""Calibrating the key/value cache: what lies in it, which layout suits each layer, and where bits count.

Statistics and the choice of a layout are taken layer by layer from the activations of full precision. Bits are spent
by what they cost in the end: the KL divergence of the whole model with one layer's keys, or values, at int4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import UsageError
from qwen_quant.grids.kv import Half, TokenGroups
from qwen_quant.grids.kv_layout import RECENT, KVCacheSpec, KVLayer, KVLayout, balance
from qwen_quant.model import DecoderLayer, Model, load_model
from qwen_quant.model.kv_cache import QuantizedKVCache, new_quantized_cache
from qwen_quant.model.transformer import causal_attention, rotate
from qwen_quant.progress import progress
from qwen_quant.quantize.kv_weights import key_bias, key_spread

AUTO_BUDGET = 4.8  # bits per number, 0.3 of FP16
DANGEROUS = 4.0  # a key bias this many times as long as what an input adds to a key drowns it in 4 bits


@dataclass
class LayerReport:
    """What was found in one layer, and what was chosen for it; `..._kld` is what int4 costs there, in nats."""

    layer: int
    key_bias_norm: float
    key_spread: float  # expected length of what the input adds to all heads' keys, from the weights alone
    key_centred: int = 0  # pairs of channels whose centre is taken out, over all heads
    key_layout: str = ""
    value_layout: str = ""
    key_error: float = 0.0  # of the attention's output at int4, as a share of its square
    value_error: float = 0.0
    key_kld: float = 0.0
    value_kld: float = 0.0
    key_bits: int = 4
    value_bits: int = 4

    @property
    def dangerous(self) -> bool:
        """Whether keys drown in their bias."""
        return self.key_bias_norm > DANGEROUS * self.key_spread


@dataclass
class KVCalibration:
    """The chosen layout, its layers' reports, and the divergence of the whole, in nats per token."""

    spec: KVCacheSpec
    reports: list[LayerReport] = field(default_factory=list)
    kld: float = 0.0


def inspect(checkpoint: Checkpoint) -> list[LayerReport]:
    """What the weights alone tell of each layer's keys."""
    spec, reports = checkpoint.spec, []
    for layer in range(spec.num_hidden_layers):
        bias = key_bias(checkpoint, layer)
        norm = 0.0 if bias is None else float(np.linalg.norm(bias))
        reports.append(LayerReport(layer, norm, key_spread(checkpoint, layer)))
    return reports


@torch.no_grad()
def calibrate_kv(
    checkpoint: Checkpoint, windows: np.ndarray, bits_budget: float = AUTO_BUDGET, bits: int | None = None
) -> KVCalibration:
    """Choose the layout of every layer's keys and values on token windows [samples, seq], at `bits` everywhere or
    mixed.

    `bits_budget` is the mean number of stored bits per number of a mixture, scales included. Raises UsageError when
    int4 alone takes more.
    """
    spec = checkpoint.spec
    least = TokenGroups(4).bits_per_value(spec.head_dim)
    if bits_budget < least:
        raise UsageError(
            f"--kv-bits-budget {bits_budget:g}: int4 takes {least:g} bits with its scales; give that or more"
        )
    model = load_model(checkpoint)
    tokens = torch.from_numpy(windows).long()
    reports = inspect(checkpoint)
    layers = []
    with progress("KV cache", 3 * spec.num_hidden_layers) as advance:
        for report, (layer, x, table) in zip(reports, layer_inputs(model, tokens), strict=True):
            layers.append(_choose_layouts(layer, x, table, report))
            advance(1, f"layer {report.layer}")
        chosen = KVCacheSpec("auto", tuple(layers), RECENT)
        plain = _log_probs(model, tokens, None)
        for index, report in enumerate(reports):
            report.key_kld = _kld(plain, model, tokens, _only(chosen, index, keys=True))
            advance(1, f"keys of layer {index}")
            report.value_kld = _kld(plain, model, tokens, _only(chosen, index, keys=False))
            advance(1, f"values of layer {index}")
    if bits is None:
        chosen = _spend(chosen, reports, bits_budget, spec.head_dim)
    else:
        chosen = chosen.with_bits(bits)
        for report in reports:
            report.key_bits = report.value_bits = bits
    return KVCalibration(chosen, reports, _kld(plain, model, tokens, chosen))


def layer_inputs(
    model: Model, tokens: Tensor
) -> Iterator[tuple[DecoderLayer, Tensor, tuple[Tensor, Tensor]]]:
    """Each layer with what its attention reads [samples, seq, hidden], and the rotary tables."""
    embedding, layers, _ = model.parts()
    hidden = embedding(tokens)
    table = model.table(0, tokens.shape[1], None)
    for layer in layers:
        assert isinstance(layer, DecoderLayer)
        yield layer, layer.attention_input(hidden), table
        hidden = layer(hidden, table)


def _choose_layouts(
    layer: DecoderLayer, x: Tensor, table: tuple[Tensor, Tensor], report: LayerReport
) -> KVLayer:
    """The changes of basis that leave the attention's output at int4 nearest to its own."""
    near = table if table[0].dim() == 2 else (table[0][0], table[1][0])  # of dual chunk attention: one chunk
    queries, keys, values = layer.attention.project(x)
    turned = rotate(keys, near)
    exact = layer.attention_output(causal_attention(rotate(queries, near), turned, values))
    trial = _Trial(layer, rotate(queries, near), turned, values, near, exact)

    centre = _pair_centre(keys)  # [n_kv_heads, head_dim]
    report.key_centred = int((centre != 0).sum()) // 2
    left = turned - rotate(centre[:, None], near)
    seen = rotate(queries, near).unflatten(1, (keys.shape[1], -1)).square().mean((0, 2, 3))
    key_balance = balance(seen, left.square().mean((0, 2)))
    value_centre = values.mean((0, 2))
    spread = (values - value_centre[:, None]).square().mean((0, 2))
    value_balance = balance(_output_gain(layer, keys.shape[1]), spread)

    key_layouts = [KVLayout(TokenGroups(4), centre, b, h) for b in (None, key_balance) for h in (False, True)]
    report.key_error, key_layout = min(
        ((trial.error(k, None), k) for k in key_layouts), key=lambda pair: pair[0]
    )
    value_layouts = [
        KVLayout(TokenGroups(4), value_centre, b, h) for b in (None, value_balance) for h in (False, True)
    ]
    report.value_error, value_layout = min(
        ((trial.error(None, v), v) for v in value_layouts), key=lambda pair: pair[0]
    )
    report.key_layout, report.value_layout = _describe(key_layout), _describe(value_layout)
    return KVLayer(_to_numpy(key_layout), _to_numpy(value_layout))


def _pair_centre(keys: Tensor) -> Tensor:
    """The mean key before rotation [n_kv_heads, head_dim] in the pairs of channels where it outweighs the spread."""
    mean = keys.mean((0, 2))
    spread = keys.var((0, 2), correction=0)
    half = mean.shape[-1] // 2
    heavy = mean.square().unflatten(-1, (2, half)).sum(-2) > spread.unflatten(-1, (2, half)).sum(-2)
    return mean * torch.cat((heavy, heavy), dim=-1)


def _output_gain(layer: DecoderLayer, n_kv_heads: int) -> Tensor:
    """How much the square of the attention's output grows with each channel of the values [n_kv_heads, head_dim]."""
    names = [name for name, _ in layer.named_modules() if name.endswith(("o_proj", "attn.c_proj"))]
    weight = layer.get_submodule(names[0]).weight
    assert isinstance(weight, Tensor)
    head_dim = layer.attention.head_dim
    return weight.square().sum(0).unflatten(0, (n_kv_heads, -1, head_dim)).sum(1)


@dataclass
class _Trial:
    """The attention of one layer, computed again with a quantized cache."""

    layer: DecoderLayer
    queries: Tensor
    keys: Tensor
    values: Tensor
    table: tuple[Tensor, Tensor]
    exact: Tensor

    def error(self, keys: KVLayout | None, values: KVLayout | None) -> float:
        """The squared error of the attention's output as a share of its square; None leaves a half as it is."""
        whole = KVLayout(Half())
        cache = QuantizedKVCache(KVLayer(keys or whole, values or whole), 0, self.keys.device)
        read = cache.append(self.keys, self.values, self.table)
        used = (read[0] if keys else self.keys, read[1] if values else self.values)
        output = self.layer.attention_output(causal_attention(self.queries, *used))
        return float((output - self.exact).square().sum() / self.exact.square().sum())


def _to_numpy(layout: KVLayout) -> KVLayout:
    centre = None if layout.centre is None or not layout.centre.any() else layout.centre.cpu().numpy()
    return replace(
        layout, centre=centre, balance=None if layout.balance is None else layout.balance.cpu().numpy()
    )


def _describe(layout: KVLayout) -> str:
    """`balanced`, `rotated`, `both` or `plain`."""
    if layout.balance is None:
        return "rotated" if layout.hadamard else "plain"
    return "both" if layout.hadamard else "balanced"


def _only(spec: KVCacheSpec, index: int, keys: bool) -> KVCacheSpec:
    """The keys, or the values, of one layer as in `spec`, and FP16 everywhere else."""
    whole = KVLayout(Half())
    layers = [KVLayer(whole, whole)] * len(spec.layers)
    mine = spec.layers[index]
    layers[index] = KVLayer(mine.keys, whole) if keys else KVLayer(whole, mine.values)
    return replace(spec, layers=tuple(layers))


def _log_probs(model: Model, tokens: Tensor, spec: KVCacheSpec | None) -> Tensor:
    """Log-probabilities [samples, seq / 2, vocab] after the second half of each window."""
    caches = None if spec is None else new_quantized_cache(spec)
    hidden = model.hidden_states(tokens, caches)[:, tokens.shape[1] // 2 :]
    return torch.log_softmax(model.head(hidden), dim=-1)


def _kld(plain: Tensor, model: Model, tokens: Tensor, spec: KVCacheSpec) -> float:
    """KL(full precision ‖ quantized cache) in nats per token."""
    found = _log_probs(model, tokens, spec)
    return float((plain.exp() * (plain - found)).sum(-1).mean())


def _spend(spec: KVCacheSpec, reports: list[LayerReport], budget: float, head_dim: int) -> KVCacheSpec:
    """int8 where int4 costs most, as far as the budget goes."""
    four, eight = TokenGroups(4), TokenGroups(8)
    halves = sorted(
        [(-r.key_kld, r.layer, True) for r in reports] + [(-r.value_kld, r.layer, False) for r in reports]
    )
    step = (eight.bits_per_value(head_dim) - four.bits_per_value(head_dim)) / len(halves)
    affordable = int((budget - four.bits_per_value(head_dim)) / step + 1e-9)
    layers = list(spec.layers)
    for _, index, keys in halves[:affordable]:
        if keys:
            layers[index] = replace(layers[index], keys=replace(layers[index].keys, grid=eight))
            reports[index].key_bits = 8
        else:
            layers[index] = replace(layers[index], values=replace(layers[index].values, grid=eight))
            reports[index].value_bits = 8
    return replace(spec, layers=tuple(layers))


def record(found: KVCalibration) -> dict[str, Any]:
    """What is stored beside the layout."""
    layers = [{**vars(report), "dangerous": report.dangerous} for report in found.reports]
    return {"kld": found.kld, "layers": layers}
