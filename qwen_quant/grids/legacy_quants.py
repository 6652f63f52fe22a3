"""GGUF's simple block types as grids, and their byte layout (ggml's block_q4_0 … block_q8_0).

Blocks of 32 weights along K, each with its own FP16 numbers. Q4_0, Q5_0, Q8_0: w = d * (q - middle).
Q4_1, Q5_1: w = d * q + m. The fifth bits of a block lie together, in front of its 16 bytes of four bits each.
"""

from __future__ import annotations

import numpy as np

from qwen_quant.grids.base import (
    Array,
    CentredGrid,
    QuantizedTensor,
    Scales,
    Sums,
    fp16_scale,
    namespace,
    ratio,
    to_fp16,
)
from qwen_quant.grids.blocks import (
    BLOCK,
    BlockGrid,
    from_half,
    half_bytes,
    join,
    pack_planes,
    unpack_planes,
)
from qwen_quant.grids.separate import SHRINK, SeparateGroups


class _ShortCodes(BlockGrid, SeparateGroups):
    """Codes of 4 or 5 bits."""

    def _pack_codes(self, codes: np.ndarray) -> np.ndarray:
        """Codes [N, K] as the bytes of each block [N, B, 4 * bits]."""
        blocks = self.blocks(codes)
        low = pack_planes(blocks & 15, 4, BLOCK // 2)
        return low if self.bits == 4 else np.concatenate((pack_planes(blocks >> 4, 1, 1), low), axis=-1)

    def _unpack_codes(self, data: np.ndarray) -> np.ndarray:
        """The inverse of `_pack_codes`."""
        codes = unpack_planes(data[..., -BLOCK // 2 :], 4, BLOCK // 2)
        if self.bits == 5:
            codes = codes | (unpack_planes(data[..., : BLOCK // 8], 1, 1) << 4)
        return codes.reshape(len(data), -1)


class SymmetricBlock(CentredGrid, BlockGrid, SeparateGroups):
    """w = d * (q - middle), d of either sign."""

    middle: int
    reach: int  # the code distance that the extreme value is given
    shrink: tuple[float, ...] = SHRINK

    def _scales(self, scale: Array) -> Scales:
        xp = namespace(scale)
        return Scales(fp16_scale(scale), xp.full_like(scale, float(self.middle)))

    def _extreme(self, groups: Array) -> Array:
        """The value of largest magnitude in each group, with its sign [M, 1]."""
        xp = namespace(groups)
        high, low = xp.max(groups, axis=1, keepdims=True), xp.min(groups, axis=1, keepdims=True)
        return xp.where(high > -low, high, low)

    def plain(self, groups: Array) -> Scales:
        return self._scales(self._extreme(groups) * (-1.0 / self.reach))

    def candidates(self, groups: Array) -> list[Scales]:
        base = self._extreme(groups) * (-1.0 / self.reach)
        return [self._scales(base * (sign * shrink)) for sign in (1.0, -1.0) for shrink in self.shrink]

    def refit(self, sums: Sums, scales: Scales) -> Scales:
        return self._scales(ratio(sums.product, sums.square))


class _ShortSymmetric(SymmetricBlock, _ShortCodes):
    """Symmetric codes of 4 or 5 bits."""

    def pack(self, tensor: QuantizedTensor) -> np.ndarray:
        return join(half_bytes(tensor.scales.scale), self._pack_codes(tensor.codes))

    def unpack(self, data: np.ndarray) -> QuantizedTensor:
        scale, codes = self.fields(data, 2, self.block_bytes - 2)
        return QuantizedTensor(self, self._unpack_codes(codes), self._scales(from_half(scale)))


class Q4_0(_ShortSymmetric):
    """4 bits, one FP16 scale per 32 weights: 4.5 bits per weight."""

    name, bits, middle, reach, block_bytes = "Q4_0", 4, 8, 8, 18


class Q5_0(_ShortSymmetric):
    """5 bits, one FP16 scale per 32 weights: 5.5 bits per weight."""

    name, bits, middle, reach, block_bytes = "Q5_0", 5, 16, 16, 22
    shrink = tuple(0.78 + 0.02 * step for step in range(14))


class Q8_0(SymmetricBlock):
    """8 bits, one FP16 scale per 32 weights: 8.5 bits per weight."""

    name, bits, middle, reach, block_bytes = "Q8_0", 8, 128, 127, 34

    def plain(self, groups: Array) -> Scales:
        xp = namespace(groups)
        return self._scales(xp.max(xp.abs(groups), axis=1, keepdims=True) / self.reach)

    def pack(self, tensor: QuantizedTensor) -> np.ndarray:
        signed = (tensor.codes.astype(np.int16) - self.middle).astype(np.int8).view(np.uint8)
        return join(half_bytes(tensor.scales.scale), self.blocks(signed))

    def unpack(self, data: np.ndarray) -> QuantizedTensor:
        scale, signed = self.fields(data, 2, BLOCK)
        codes = (np.ascontiguousarray(signed).view(np.int8).astype(np.int16) + self.middle).astype(np.uint8)
        return QuantizedTensor(self, codes.reshape(len(data), -1), self._scales(from_half(scale)))


class _WithMinimum(_ShortCodes):
    """w = d * q + m."""

    rule = "minimum"
    cuts: tuple[float, ...]  # shares of the range cut off at either end by the search

    def value(self, codes: Array, scale: Array, offset: Array) -> Array:
        return scale * codes + offset

    def level(self, codes: Array, offset: Array) -> Array:
        return codes

    def position(self, w: Array, scale: Array, offset: Array) -> Array:
        return (w - offset) / scale

    def _covering(self, groups: Array, low_share: float, high_share: float) -> Scales:
        xp = namespace(groups)
        high, low = xp.max(groups, axis=1, keepdims=True), xp.min(groups, axis=1, keepdims=True)
        span = high - low
        low, high = low + span * low_share, high - span * high_share
        return Scales(fp16_scale((high - low) / self.max_code), to_fp16(low))

    def plain(self, groups: Array) -> Scales:
        return self._covering(groups, 0.0, 0.0)

    def candidates(self, groups: Array) -> list[Scales]:
        return [self._covering(groups, low, high) for low in self.cuts for high in self.cuts]

    def refit(self, sums: Sums, scales: Scales) -> Scales:
        # Weighted linear regression of the weights on their codes.
        code, value = ratio(sums.level, sums.weight), ratio(sums.value, sums.weight)
        variance = ratio(sums.square, sums.weight) - code * code
        covariance = ratio(sums.product, sums.weight) - code * value
        scale = fp16_scale(ratio(covariance, variance))
        return Scales(scale, to_fp16(value - scale * code))

    def pack(self, tensor: QuantizedTensor) -> np.ndarray:
        scales = tensor.scales
        return join(half_bytes(scales.scale), half_bytes(scales.offset), self._pack_codes(tensor.codes))

    def unpack(self, data: np.ndarray) -> QuantizedTensor:
        scale, minimum, codes = self.fields(data, 2, 2, self.block_bytes - 4)
        return QuantizedTensor(self, self._unpack_codes(codes), Scales(from_half(scale), from_half(minimum)))


class Q4_1(_WithMinimum):
    """4 bits, an FP16 scale and minimum per 32 weights: 5 bits per weight."""

    name, bits, block_bytes = "Q4_1", 4, 20
    cuts = (-0.02, 0.0, 0.03, 0.06, 0.1)


class Q5_1(_WithMinimum):
    """5 bits, an FP16 scale and minimum per 32 weights: 6 bits per weight."""

    name, bits, block_bytes = "Q5_1", 5, 24
    cuts = (-0.01, 0.0, 0.01, 0.02, 0.035, 0.06)
