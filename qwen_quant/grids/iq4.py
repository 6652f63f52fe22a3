"""GGUF's 4-bit types with a code book, as grids, and their byte layout (ggml's block_iq4_nl, block_iq4_xs).

A code names one of 16 levels that lie closer together near zero: w = scale * LEVELS[q].
"""

from __future__ import annotations

import array_api_compat
import numpy as np

from qwen_quant.grids.base import AffineGrid, Array, QuantizedTensor, Scales, namespace, ratio, to_fp16
from qwen_quant.grids.blocks import BLOCK, from_half, half_bytes, join, pack_planes, unpack_planes
from qwen_quant.grids.legacy_quants import SymmetricBlock
from qwen_quant.grids.super_blocks import SymmetricSuperBlock, super_scales

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# The nearest level's code for x in steps of one half from LEVELS[0] on: all midpoints lie on these steps.
_MIDPOINTS = (np.array(LEVELS[1:]) + np.array(LEVELS[:-1])) / 2
_NEAREST = np.searchsorted(_MIDPOINTS, np.arange(2 * (LEVELS[-1] - LEVELS[0]) + 1) / 2 + LEVELS[0], "right")


class CodeBook(AffineGrid):
    """Levels in place of equal steps. A scale may be 0: no level is."""

    rule = "levels"
    levels, nearest_codes = LEVELS, tuple(_NEAREST.tolist())

    def value(self, codes: Array, scale: Array, offset: Array) -> Array:
        return scale * self.level(codes, offset)

    def level(self, codes: Array, offset: Array) -> Array:
        xp = namespace(codes)
        levels = xp.asarray(LEVELS, dtype=xp.float32, device=array_api_compat.device(codes))
        flat = xp.reshape(xp.astype(codes, xp.int64), (-1,))
        return xp.reshape(xp.take(levels, flat, axis=0), codes.shape)

    def position(self, w: Array, scale: Array, offset: Array) -> Array:
        """The nearest code itself: nothing lies between codes."""
        xp = namespace(w)
        nearest = xp.asarray(_NEAREST, dtype=xp.float32, device=array_api_compat.device(w))
        level = xp.clip(ratio(w, scale), float(LEVELS[0]), float(LEVELS[-1]))
        step = xp.reshape(xp.astype(xp.floor((level - LEVELS[0]) * 2), xp.int64), (-1,))
        return xp.reshape(xp.take(nearest, step, axis=0), w.shape)


class IQ4_NL(CodeBook, SymmetricBlock):
    """One FP16 scale per 32 weights: 4.5 bits per weight."""

    name, bits, block_bytes = "IQ4_NL", 4, 18
    middle, reach = 0, -LEVELS[0]

    def _scales(self, scale: Array) -> Scales:
        return Scales(to_fp16(scale), namespace(scale).zeros_like(scale))

    def candidates(self, groups: Array) -> list[Scales]:
        base = self._extreme(groups) * (-1.0 / self.reach)
        return [self._scales(base * start) for start in STARTS]

    def pack(self, tensor: QuantizedTensor) -> np.ndarray:
        return join(half_bytes(tensor.scales.scale), pack_planes(self.blocks(tensor.codes), 4, BLOCK // 2))

    def unpack(self, data: np.ndarray) -> QuantizedTensor:
        scale, codes = self.fields(data, 2, BLOCK // 2)
        codes = unpack_planes(codes, 4, BLOCK // 2).reshape(len(data), -1)
        return QuantizedTensor(self, codes, self._scales(from_half(scale)))


# Scales tried, relative to the one that gives the extreme value the level -127. The negative ones give it 113.
STARTS = (0.8, 0.88, 0.94, 1.0, 1.05, 1.1, 1.2, -0.88, -0.98, -1.05, -1.12, -1.18, -1.26, -1.35)


class IQ4_XS(CodeBook, SymmetricSuperBlock):
    """8 groups of 32 with signed 6-bit scales: 4.25 bits per weight."""

    name, bits, group_size, block_bytes = "IQ4_XS", 4, 32, 136
    middle, reach, scale_limits = 0, -LEVELS[0], (-32, 31)
    starts = STARTS

    def _nonzero(self, ints: Array) -> Array:
        return ints

    def pack(self, tensor: QuantizedTensor) -> np.ndarray:
        d, ints = super_scales(self._by_super_block(tensor.scales.scale), self.scale_limits)
        ints = ints + 32
        high, low = pack_planes(ints >> 4, 2, 1), pack_planes(ints & 15, 4, 1)
        return join(half_bytes(d), high, low, pack_planes(self.blocks(tensor.codes), 4, 16))

    def unpack(self, data: np.ndarray) -> QuantizedTensor:
        d, high, low, codes = self.fields(data, 2, 2, 4, 128)
        ints = unpack_planes(low, 4, 1) | (unpack_planes(high, 2, 1) << 4)
        return self._tensor(unpack_planes(codes, 4, 16), d, ints.astype(np.int64) - 32)
