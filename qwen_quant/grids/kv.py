"""Grids of the key/value cache: how vectors [..., tokens, head_dim] are stored as they arrive.

A weight is fitted once and with patience; a key is written in passing and read at every later token. So these grids
have no search beyond one group, and their scales stand where attention can take them out of its sums: a scale of a
token's channels belongs to the score of a key, and to the probability that a value is multiplied with. Functions take
NumPy arrays or torch tensors alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import array_api_compat

from qwen_quant.grids.base import Array, namespace, to_fp16

GROUP = 32  # channels of a token that share a scale
SCALE_EXPONENT = 20  # scale bytes are floats of 5 exponent and 3 mantissa bits, from 2^-20 to 1.875 * 2^11
SCALE_SHIFT = 20  # bits of a float32's mantissa that a scale byte lacks
_LOWEST = (127 - SCALE_EXPONENT) << 3  # of a float32's upper bits, where the bytes begin
STEPS_DOWN = 4  # scale bytes below the covering one that int4 tries
INT4_MIDDLE = 7.5  # int4 codes 0 … 15 stand for -7.5 … 7.5 scales: no zero, but as far up as down
INT8_MAX = 127


def scale_bytes(x: Array) -> Array:
    """The smallest stored scale (uint8) that is not below x (float32, positive), saturating at both ends."""
    xp = namespace(x)
    bits = xp.astype(_reinterpret(xp.astype(x, xp.float32), "int32"), xp.int64)
    rounded = (bits + ((1 << SCALE_SHIFT) - 1)) >> SCALE_SHIFT
    return xp.astype(xp.clip(rounded - _LOWEST, 0, 255), xp.uint8)


def byte_scales(codes: Array) -> Array:
    """The float32 scales that bytes (uint8) stand for."""
    xp = namespace(codes)
    bits = (xp.astype(codes, xp.int32) + _LOWEST) << SCALE_SHIFT
    return _reinterpret(bits, "float32")


def _reinterpret(x: Array, dtype: str) -> Array:
    """The same bits as another type of the same width, which the array API has no name for."""
    return x.view(getattr(namespace(x), dtype))


@dataclass
class KVCodes:
    """Vectors as they are stored: codes, and the scales and offsets of their groups."""

    codes: Array
    scale: Array | None = None
    offset: Array | None = None


class KVGrid(ABC):
    """How vectors are rounded and stored."""

    name: str
    bits: int
    tokens_per_group = 1  # that are stored together

    @abstractmethod
    def bits_per_value(self, head_dim: int) -> float:
        """Stored bits per number, scales included."""

    @abstractmethod
    def encode(self, x: Array) -> KVCodes:
        """Store float32 vectors [..., T, head_dim]; T is a multiple of `tokens_per_group`."""

    @abstractmethod
    def decode(self, stored: KVCodes) -> Array:
        """The float32 vectors [..., T, head_dim] that attention sees."""


class Half(KVGrid):
    """FP16 as it is."""

    name, bits = "f16", 16

    def bits_per_value(self, head_dim: int) -> float:
        return 16.0

    def encode(self, x: Array) -> KVCodes:
        xp = namespace(x)
        return KVCodes(xp.astype(xp.clip(x, -65504.0, 65504.0), xp.float16))

    def decode(self, stored: KVCodes) -> Array:
        return namespace(stored.codes).astype(stored.codes, namespace(stored.codes).float32)


class TokenGroups(KVGrid):
    """Symmetric int8 or int4 with one scale byte for each 32 channels of a token: the layout of the engine.

    int8 takes the scale that covers the group; int4 the best of those at or a little below it.
    """

    def __init__(self, bits: int) -> None:
        self.name, self.bits = f"int{bits}", bits

    def bits_per_value(self, head_dim: int) -> float:
        return self.bits + 8 / group_size(head_dim)

    def encode(self, x: Array) -> KVCodes:
        xp = namespace(x)
        groups = xp.reshape(x, (*x.shape[:-1], -1, group_size(x.shape[-1])))
        largest = xp.max(xp.abs(groups), axis=-1)  # [..., T, G]
        if self.bits == 8:
            stored = scale_bytes(largest / INT8_MAX)
        else:
            stored = self._searched(groups, scale_bytes(largest / (INT4_MIDDLE + 0.5)))
        codes = xp.astype(self._round(groups, byte_scales(stored)[..., None]), self._dtype(xp))
        return KVCodes(xp.reshape(codes, x.shape), stored)

    def decode(self, stored: KVCodes) -> Array:
        xp, shape = namespace(stored.codes), stored.codes.shape
        assert stored.scale is not None
        codes = xp.astype(stored.codes, xp.float32)
        groups = xp.reshape(codes, (*shape[:-1], stored.scale.shape[-1], -1))
        return xp.reshape(self._value(groups, byte_scales(stored.scale)[..., None]), shape)

    def _dtype(self, xp: Any) -> Any:
        return xp.int8 if self.bits == 8 else xp.uint8

    def _round(self, groups: Array, scale: Array) -> Array:
        xp = namespace(groups)
        if self.bits == 8:
            return xp.clip(xp.round(groups / scale), -INT8_MAX, INT8_MAX)
        return xp.clip(xp.round(groups / scale + INT4_MIDDLE), 0, 15)

    def _value(self, codes: Array, scale: Array) -> Array:
        return (codes if self.bits == 8 else codes - INT4_MIDDLE) * scale

    def _searched(self, groups: Array, covering: Array) -> Array:
        """The scale bytes [..., T, G] of least squared error."""
        xp = namespace(groups)
        best = covering
        least = xp.full_like(groups[..., 0], xp.inf)
        for step in range(STEPS_DOWN):
            trial = xp.astype(xp.clip(xp.astype(covering, xp.int32) - step, 0, 255), xp.uint8)
            scale = byte_scales(trial)[..., None]
            gap = groups - self._value(self._round(groups, scale), scale)
            error = xp.sum(gap * gap, axis=-1)
            best = xp.where(error < least, trial, best)
            least = xp.minimum(error, least)
        return best


class ChannelGroups(KVGrid):
    """Asymmetric, one FP16 scale and minimum for each channel of 32 tokens: keys as in KIVI (Liu et al. 2024,
    arXiv:2402.02750). Tokens wait in FP16 until their group is complete."""

    tokens_per_group = 32

    def __init__(self, bits: int) -> None:
        self.name, self.bits = f"channel{bits}", bits

    def bits_per_value(self, head_dim: int) -> float:
        return self.bits + 32 / self.tokens_per_group

    def encode(self, x: Array) -> KVCodes:
        xp = namespace(x)
        groups = self._groups(x)
        low, high = xp.min(groups, axis=-2, keepdims=True), xp.max(groups, axis=-2, keepdims=True)
        return _asymmetric(groups, low, high, 2**self.bits - 1, x.shape)

    def decode(self, stored: KVCodes) -> Array:
        xp = namespace(stored.codes)
        assert stored.scale is not None and stored.offset is not None
        codes = self._groups(xp.astype(stored.codes, xp.float32))
        return xp.reshape(
            codes * stored.scale[..., None, :] + stored.offset[..., None, :], stored.codes.shape
        )

    def _groups(self, x: Array) -> Array:
        """[..., T, D] as [..., T / 32, 32, D]."""
        return namespace(x).reshape(x, (*x.shape[:-2], -1, self.tokens_per_group, x.shape[-1]))


class TokenRange(KVGrid):
    """Asymmetric, FP16 scale and minimum for each run of a token's channels: values as in KIVI."""

    def __init__(self, bits: int) -> None:
        self.name, self.bits = f"range{bits}", bits

    def bits_per_value(self, head_dim: int) -> float:
        return self.bits + 32 / group_size(head_dim)

    def encode(self, x: Array) -> KVCodes:
        xp = namespace(x)
        groups = xp.reshape(x, (*x.shape[:-1], -1, group_size(x.shape[-1])))
        low, high = xp.min(groups, axis=-1, keepdims=True), xp.max(groups, axis=-1, keepdims=True)
        return _asymmetric(groups, low, high, 2**self.bits - 1, x.shape)

    def decode(self, stored: KVCodes) -> Array:
        xp, shape = namespace(stored.codes), stored.codes.shape
        assert stored.scale is not None and stored.offset is not None
        groups = xp.reshape(xp.astype(stored.codes, xp.float32), (*stored.scale.shape, -1))
        return xp.reshape(groups * stored.scale[..., None] + stored.offset[..., None], shape)


class Qwen1Int8(KVGrid):
    """Qwen (1)'s own int8 cache: `quantize_cache_v` of its modeling_qwen.py, for a token at a time.

    Each head of a token has an FP16 scale and zero point over its range, and codes are cut, not rounded.
    """

    name, bits = "qwen1", 8

    def bits_per_value(self, head_dim: int) -> float:
        return 8 + 32 / head_dim

    def encode(self, x: Array) -> KVCodes:
        xp = namespace(x)
        low, high = xp.min(x, axis=-1, keepdims=True), xp.max(x, axis=-1, keepdims=True)
        scale = to_fp16((high - low) / 255.0)
        scale = xp.where(scale == 0, xp.ones_like(scale), scale)
        zero = to_fp16(-low / scale)
        return KVCodes(xp.astype(xp.clip(x / scale + zero, 0.0, 255.0), xp.uint8), scale, zero)

    def decode(self, stored: KVCodes) -> Array:
        xp = namespace(stored.codes)
        return stored.scale * (xp.astype(stored.codes, xp.float32) - stored.offset)


def group_size(head_dim: int) -> int:
    """Channels of a token that share a scale: 32, or the whole head where it is no multiple of that."""
    return GROUP if head_dim % GROUP == 0 else head_dim


def _asymmetric(groups: Array, low: Array, high: Array, max_code: int, shape: tuple[int, ...]) -> KVCodes:
    """`groups` between their extremes `low` and `high` (kept as a dimension of one), codes in `shape`."""
    xp = namespace(groups)
    axis = -1 if low.shape[-1] == 1 else -2
    low = to_fp16(low)
    scale = to_fp16((high - low) / max_code)
    scale = xp.where(scale == 0, xp.ones_like(scale), scale)
    codes = xp.clip(xp.round((groups - low) / scale), 0.0, float(max_code))
    codes = xp.reshape(xp.astype(codes, xp.uint8), shape)
    return KVCodes(codes, xp.squeeze(scale, axis=axis), xp.squeeze(low, axis=axis))


def hadamard(x: Array) -> Array:
    """x [..., D] rotated by the orthonormal Hadamard matrix of the largest power of two that divides D, block by
    block (Sylvester's construction; its own inverse)."""
    xp, dim = namespace(x), x.shape[-1]
    size = dim & -dim
    half = 1
    while half < size:
        pairs = xp.reshape(x, (*x.shape[:-1], -1, 2, half))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = xp.reshape(xp.stack([first + second, first - second], axis=-2), x.shape)
        half *= 2
    return x / xp.asarray(float(size) ** 0.5, dtype=x.dtype, device=array_api_compat.device(x))
