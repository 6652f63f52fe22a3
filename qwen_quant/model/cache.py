"""The cache of keys and values that the reference model attends over."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys (after rotation) and values of one layer, each [batch, n_kv_heads, seq, head_dim].

    `prompt` is how many tokens were read first, on which Qwen (1)'s rotary base depends. New positions have to
    lie within one stretch of `stretch` positions (0: anywhere).
    """

    stretch = 0

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.prompt: int | None = None

    @property
    def length(self) -> int:
        """Tokens so far."""
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Add new positions, whose keys `table` has turned, and return all of them."""
        if self.prompt is None:
            self.prompt = keys.shape[2]
        if self.keys is not None and self.values is not None:
            keys = torch.cat((self.keys, keys), dim=2)
            values = torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        return keys, values


def split_at_stretches(x: Tensor, caches: Sequence[KVCache], dim: int = 1) -> list[Tensor]:
    """x, whose positions along `dim` follow those in `caches`, in pieces that these take at once."""
    stretch, total = caches[0].stretch, x.shape[dim]
    if not stretch:
        return [x]
    for cache in caches:
        cache.prompt = cache.prompt or total
    begins = range(-(caches[0].length % stretch), total, stretch)
    ends = [min(begin + stretch, total) for begin in begins]
    return list(x.split([end - max(begin, 0) for begin, end in zip(begins, ends, strict=True)], dim=dim))
