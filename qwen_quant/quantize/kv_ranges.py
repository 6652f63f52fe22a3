"""Scales of a cache with one scale for each channel and all tokens, as ONNX's GroupQueryAttention has it.

Such a scale is fixed before the first token comes, so it covers what calibration text has shown. Keys lie there as RoPE
turned them: a pair of channels gets the range of its length, which no position changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.model import load_model
from qwen_quant.model.transformer import rotate
from qwen_quant.progress import progress
from qwen_quant.quantize.kv_cache import layer_inputs

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the range that int4 may cover; int8 takes all of it


@dataclass(frozen=True)
class ChannelScales:
    """What codes of a cache, -2^(bits - 1) … 2^(bits - 1) - 1, are multiplied with: [layers, n_kv_heads, head_dim]."""

    bits: int
    keys: np.ndarray
    values: np.ndarray


@torch.no_grad()
def channel_scales(checkpoint: Checkpoint, windows: np.ndarray, bits: int) -> ChannelScales:
    """Scales of `bits` (8 or 4) for what token windows [samples, seq] leave in the cache."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    model = load_model(checkpoint)
    with progress("KV cache", checkpoint.spec.num_hidden_layers) as advance:
        for layer, x, table in layer_inputs(model, torch.from_numpy(windows).long()):
            near = table if table[0].dim() == 2 else (table[0][0], table[1][0])
            _, keys, values = layer.attention.project(x)
            half = keys.shape[-1] // 2
            lengths = keys[..., :half].square().add(keys[..., half:].square()).sqrt().amax((0, 2))
            found[0].append(_best_scales(rotate(keys, near), torch.cat((lengths, lengths), -1), bits))
            found[1].append(_best_scales(values, values.abs().amax((0, 2)), bits))
            advance(1, f"layer {len(found[0]) - 1}")
    return ChannelScales(bits, *(torch.stack(scales).numpy() for scales in found))


def _best_scales(x: Tensor, largest: Tensor, bits: int) -> Tensor:
    """Scales [n_kv_heads, head_dim] of least squared error on x [samples, n_kv_heads, seq, head_dim]."""
    top = 2 ** (bits - 1) - 1
    whole = (largest / top).clamp(min=1e-8)
    best, least = whole, torch.full_like(whole, torch.inf)
    for share in SHARES if bits == 4 else SHARES[:1]:
        scale = (share * whole)[:, None]
        error = ((x / scale).round().clamp(-top - 1, top) * scale - x).square().sum((0, 2))
        best = torch.where(error < least, share * whole, best)
        least = torch.minimum(error, least)
    return best
