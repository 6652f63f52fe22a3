"""Dual chunk attention of the 1M models: what `dual_chunk_attention_config` of a config.json says.

An et al. 2024, arXiv:2402.17463; its temperature: Qwen2.5-1M technical report, arXiv:2501.15383.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qwen_quant.config import ConfigReader
from qwen_quant.errors import ConfigError

KEY = "dual_chunk_attention_config"
# These make long prompts faster by leaving out what matters least; the reference model attends to everything.
_APPROXIMATION = {
    "sparse_attention_config",
    "sparse_attention_enabled",
    "sparse_attention_threshold",
    "sparse_attention_last_q",
}
_KEYS = {"chunk_size", "local_size", "original_max_position_embeddings"} | _APPROXIMATION


@dataclass(frozen=True)
class DualChunk:
    """How a text is cut so that no two tokens are farther apart than in training.

    Chunks have `chunk_len` = `chunk_size` - `local_size` tokens, and a key's position is the one in its chunk. A
    query at position p of its chunk stands at p for keys of the same chunk, at p + chunk_len but at most at
    `chunk_size` for those of the chunk before (the nearest `local_size` keep their distance), and at one fixed
    position for all earlier ones. The paper clamps at chunk_size - 1, its code and vLLM, which the models are made
    for, at chunk_size. Beyond `original_max_position_embeddings` tokens scores are multiplied by `temperature`.
    """

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int | None = None  # None: no temperature

    @property
    def chunk_len(self) -> int:
        """Tokens of a chunk."""
        return self.chunk_size - self.local_size

    @property
    def farthest(self) -> int:
        """Where a query stands for keys that lie two or more chunks back."""
        return min(2 * self.chunk_len - 1, self.chunk_size)

    @property
    def exact_length(self) -> int:
        """The longest text, in tokens, for which plain attention is the same."""
        return min(self.farthest + 1, self.original_max_position_embeddings or self.farthest + 1)

    def temperature(self, length: int) -> float:
        """What the scores of a text of `length` tokens are multiplied by: (0.1 ln(length / original) + 1)²."""
        if self.original_max_position_embeddings is None:
            return 1.0
        return max(1.0, 0.1 * math.log(length / self.original_max_position_embeddings) + 1.0) ** 2


def read_dual_chunk(get: ConfigReader, extended: bool, windowed: bool) -> DualChunk | None:
    """The setting of a config, None without one. `extended`, `windowed`: whether the config has a rope scaling
    or a sliding window, which do not go together with it. Raises ConfigError naming what is not understood."""
    stated = get.config.get(KEY)
    if stated is None or stated == {}:
        return None
    if not isinstance(stated, Mapping):
        raise ConfigError(f"{get.where}: {KEY} is {stated!r}; it must be an object")
    inner = ConfigReader(stated, f"{get.where}: {KEY}")
    unknown = sorted(set(stated) - _KEYS)
    if unknown:
        raise ConfigError(f"{inner.where}: {unknown[0]!r} is not known; remove it if it has no effect")
    for present, other in ((extended, "rope_scaling"), (windowed, "use_sliding_window")):
        if present:
            raise ConfigError(f"{get.where}: {KEY} and {other} exclude each other; keep the right one only")
    original = None
    if stated.get("original_max_position_embeddings") is not None:
        original = inner.positive("original_max_position_embeddings")
    found = DualChunk(inner.positive("chunk_size"), inner.positive("local_size"), original)
    if found.chunk_len < 1:
        raise ConfigError(
            f"{inner.where}: local_size {found.local_size} is not below chunk_size {found.chunk_size}"
        )
    return found
