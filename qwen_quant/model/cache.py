"""The cache of keys and values that the reference model attends over."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys (after rotation) and values of one layer, each [batch, n_kv_heads, seq, head_dim].

    `prompt` is how many tokens were read first, on which Qwen (1)'s rotary base depends.
    """

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
