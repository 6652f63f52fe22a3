"""What the key/value cache of a model looks like, layer by layer, as data that calibration, the reference model, the
exporter and the engine share.

Three changes of basis make a vector fit its grid, and all of them leave attention as it is:

- *centre*: keys lie around a vector that was fixed before RoPE turned it (Qwen2's key bias above all, hundreds of
  times what tells tokens apart). What is stored is the key minus the turned centre; a score gets the query's product
  with the turned centre back, a sum over the pairs of channels that have one. A value's centre comes back once, after
  the sum over tokens, because probabilities sum to one.
- *balance*: channels are multiplied when they are stored, and the query (or the attention's output) is divided. With
  balance² = sqrt(E[q²] / E[k²]) of each channel the noise of all scores is least: of sum(balance² k²) * sum(q² /
  balance²) by Cauchy and Schwarz.
- *hadamard*: both sides are rotated, so that no channel sticks out of its group (QuaRot, Ashkboos et al. 2024,
  arXiv:2404.00456).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qwen_quant.errors import UsageError
from qwen_quant.grids.base import Array, namespace
from qwen_quant.grids.kv import (
    ChannelGroups,
    Half,
    KVCodes,
    KVGrid,
    Qwen1Int8,
    TokenGroups,
    TokenRange,
    hadamard,
)

RECENT = 32  # positions in a stretch; int8 and int4 caches show a token its own stretch in FP16
NAMES = ("f16", "int8", "int4", "kivi4", "qwen1")  # layouts that need no calibration


@dataclass(frozen=True)
class KVLayout:
    """The keys, or the values, of one layer. `centre` and `balance` are float32 [n_kv_heads, head_dim]."""

    grid: KVGrid
    centre: Array | None = None
    balance: Array | None = None
    hadamard: bool = False

    def encode(self, x: Array, centre: Array | None) -> KVCodes:
        """Store x [..., n_kv_heads, T, head_dim]; `centre` is what is taken out, turned to the positions of keys."""
        x = x if centre is None else x - centre
        if self.balance is not None:
            x = x * self.balance[:, None, :]
        return self.grid.encode(hadamard(x) if self.hadamard else x)

    def decode(self, stored: KVCodes, centre: Array | None) -> Array:
        """What attention sees, [..., n_kv_heads, T, head_dim]; `centre` as in `encode`."""
        x = self.grid.decode(stored)
        x = hadamard(x) if self.hadamard else x
        if self.balance is not None:
            x = x / self.balance[:, None, :]
        return x if centre is None else x + centre


@dataclass(frozen=True)
class KVLayer:
    """Both halves of a layer's cache."""

    keys: KVLayout
    values: KVLayout

    def bits_per_value(self, head_dim: int) -> float:
        """Stored bits per number of keys and values together."""
        return (self.keys.grid.bits_per_value(head_dim) + self.values.grid.bits_per_value(head_dim)) / 2


@dataclass(frozen=True)
class KVCacheSpec:
    """The cache of a model.

    Positions are counted in stretches of `residual`: a token sees its own stretch in FP16, and earlier ones as they are
    stored. So what it sees follows from its position, not from how many tokens were read at a time.
    """

    name: str
    layers: tuple[KVLayer, ...]
    residual: int = 0

    def bytes_per_token(self, n_kv_heads: int, head_dim: int) -> float:
        """Bytes that a token adds to the cache, scales included."""
        values = 2 * n_kv_heads * head_dim
        return sum(layer.bits_per_value(head_dim) for layer in self.layers) * values / 8

    def recent_bytes(self, n_kv_heads: int, head_dim: int) -> int:
        """Bytes of what is kept in FP16 beside that, whatever the context: two stretches, so that tokens can be taken
        back."""
        halves = [half for layer in self.layers for half in (layer.keys, layer.values)]
        quantized = sum(not isinstance(half.grid, Half) for half in halves)
        return 2 * self.residual * quantized * n_kv_heads * head_dim * 2

    def with_bits(self, bits: int) -> KVCacheSpec:
        """The same changes of basis with every vector at `bits`."""
        grid = Half() if bits == 16 else TokenGroups(bits)
        layers = (
            KVLayer(replace(layer.keys, grid=grid), replace(layer.values, grid=grid)) for layer in self.layers
        )
        return replace(self, name=grid.name, layers=tuple(layers))


def balance(seen: Array, stored: Array) -> Array:
    """What channels are multiplied by [n_kv_heads, head_dim], from the mean squares of what they meet and their own.

    sqrt(sqrt(seen / stored)), but for a factor that leaves the stored mean square 1.
    """
    xp = namespace(seen)
    floors = [1e-6 * xp.clip(xp.mean(x, axis=-1, keepdims=True), 1e-20, None) for x in (seen, stored)]
    factors = xp.sqrt(xp.sqrt((seen + floors[0]) / (stored + floors[1])))
    return factors / xp.sqrt(xp.mean(factors * factors * stored + floors[1], axis=-1, keepdims=True))


def uncalibrated(name: str, bases: Sequence[KVLayer | None]) -> KVCacheSpec:
    """The layout `name` for a model of so many layers.

    `int8` and `int4` take centres and balances from `bases` (None: none), `int4` rotates too; `kivi4` and `qwen1` are
    what others do. Raises UsageError for a name that is not in NAMES.
    """
    n_layers = len(bases)
    if name == "f16":
        return KVCacheSpec(name, (KVLayer(KVLayout(Half()), KVLayout(Half())),) * n_layers)
    if name == "qwen1":
        return KVCacheSpec(name, (KVLayer(KVLayout(Qwen1Int8()), KVLayout(Qwen1Int8())),) * n_layers)
    if name == "kivi4":
        pair = KVLayer(KVLayout(ChannelGroups(4)), KVLayout(TokenRange(4)))
        return KVCacheSpec(name, (pair,) * n_layers, residual=ChannelGroups.tokens_per_group)
    if name in ("int8", "int4"):
        grid, rotated = TokenGroups(int(name[3:])), name == "int4"
        plain = KVLayer(KVLayout(grid), KVLayout(grid))
        layers = (
            KVLayer(*(replace(half, grid=grid, hadamard=rotated) for half in (basis.keys, basis.values)))
            for basis in (basis or plain for basis in bases)
        )
        return KVCacheSpec(name, tuple(layers), RECENT)
    raise UsageError(
        f"--kv-cache {name}: unknown; choose {', '.join(NAMES)}, auto, or a file of `qwen-quant kv`"
    )
