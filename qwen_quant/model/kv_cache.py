"""A quantized key/value cache for the reference model: what it hands to attention is what a reader would decode."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qwen_quant.grids.kv import Half
from qwen_quant.grids.kv_layout import KVCacheSpec, KVLayer, KVLayout
from qwen_quant.model.cache import KVCache
from qwen_quant.model.transformer import rotate


class QuantizedKVCache(KVCache):
    """Keys and values of one layer after a trip through their grids.

    With a `residual` the positions of the latest stretch are kept in FP16, and without it those whose group is not
    complete.
    """

    def __init__(self, layer: KVLayer, residual: int, device: torch.device) -> None:
        super().__init__()
        self.stretch = residual
        self._halves = [_Half(_on(layout, device), residual) for layout in (layer.keys, layer.values)]
        key_centre, value_centre = (half.layout.centre for half in self._halves)
        self._key_centre: Tensor | None = None if key_centre is None else key_centre[:, None, :]
        self._value_centre: Tensor | None = None if value_centre is None else value_centre[:, None, :]

    def append(self, keys: Tensor, values: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """As KVCache's; the keys' centre is turned as they were."""
        if self.prompt is None:
            self.prompt = keys.shape[2]
        centre = (
            None if self._key_centre is None else rotate(self._key_centre, table)
        )  # [n_kv_heads, seq, head_dim]
        self.keys = self._halves[0].add(keys.float(), centre)
        self.values = self._halves[1].add(values.float(), self._value_centre)
        return self.keys, self.values


class _Half:
    """The keys or the values: what is decoded already, and what still waits."""

    def __init__(self, layout: KVLayout, residual: int) -> None:
        self.layout, self.residual = layout, residual
        self.recent = replace(layout, grid=Half())
        self.decoded: list[Tensor] = []
        self.waiting: list[Tensor] = []  # vectors, and their centres when they have some

    def add(self, x: Tensor, centre: Tensor | None) -> Tensor:
        """All vectors [batch, n_kv_heads, total, head_dim] after x [batch, n_kv_heads, seq, head_dim] came, as these
        see them."""
        done = sum(part.shape[2] for part in self.decoded)
        past = done + (self.waiting[0].shape[2] if self.waiting else 0)
        new = [x] if centre is None else [x, centre.expand(x.shape)]
        if self.waiting:
            new = [torch.cat(pair, dim=2) for pair in zip(self.waiting, new, strict=True)]
        ready = past - past % self.residual - done if self.residual else new[0].shape[2]
        ready -= ready % self.layout.grid.tokens_per_group
        if ready:
            self.decoded.append(_stored(self.layout, [part[:, :, :ready] for part in new]))
        self.waiting = [part[:, :, ready:] for part in new]
        recent = [_stored(self.recent, self.waiting)] if self.waiting[0].shape[2] else []
        return torch.cat((*self.decoded, *recent), dim=2)


def _stored(layout: KVLayout, vectors: list[Tensor]) -> Tensor:
    """What attention sees of vectors, which may have centres."""
    centre = vectors[1] if len(vectors) > 1 else None
    return layout.decode(layout.encode(vectors[0], centre), centre)


def _on(layout: KVLayout, device: torch.device) -> KVLayout:
    """The layout with its arrays as tensors on `device`."""

    def move(x: object) -> Tensor | None:
        return None if x is None else torch.as_tensor(x, dtype=torch.float32, device=device)

    return replace(layout, centre=move(layout.centre), balance=move(layout.balance))


def new_quantized_cache(spec: KVCacheSpec, device: torch.device | str = "cpu") -> list[KVCache]:
    """An empty cache of this layout for each layer."""
    return [QuantizedKVCache(layer, spec.residual, torch.device(device)) for layer in spec.layers]
