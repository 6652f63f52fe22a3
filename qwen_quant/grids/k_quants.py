"""GGUF's K-quants as grids, and their byte layout (ggml's block_q2_K … block_q6_K).

256 weights per block. Q2_K, Q4_K, Q5_K: w = d * scale_j * q - dmin * minimum_j. Q3_K, Q6_K: w = d * scale_j * (q -
middle).
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from qwen_quant.grids.base import CentredGrid, QuantizedTensor, Scales
from qwen_quant.grids.blocks import from_half, half_bytes, join, pack_planes, unpack_planes
from qwen_quant.grids.minima import MinimumSuperBlock
from qwen_quant.grids.super_blocks import SymmetricSuperBlock, super_scales


class _WithMinima(MinimumSuperBlock):
    """The fields that the types with minima share."""

    @abstractmethod
    def _pack_integers(self, scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
        """Integer scales and minima [N, B, S] as bytes."""

    @abstractmethod
    def _unpack_integers(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `_pack_integers`."""

    def _scale_fields(self, tensor: QuantizedTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The bytes of d, of dmin and of the integers."""
        d, scales = super_scales(self._by_super_block(tensor.scales.scale), (0, self.limit))
        dmin, minima = super_scales(-self._by_super_block(tensor.scales.offset), (0, self.limit))
        return half_bytes(d), half_bytes(dmin), self._pack_integers(scales, minima)

    def _scales_of(self, d: np.ndarray, dmin: np.ndarray, ints: np.ndarray) -> Scales:
        scales, minima = (x.astype(np.float32) for x in self._unpack_integers(ints))
        n = len(d)
        return Scales(
            (from_half(d)[..., None] * scales).reshape(n, -1),
            -(from_half(dmin)[..., None] * minima).reshape(n, -1),
        )


class Q2_K(_WithMinima):
    """2 bits, 16 groups of 16 with 4-bit scales and minima: 2.625 bits per weight."""

    name, bits, group_size, limit, block_bytes = "Q2_K", 2, 16, 15, 84
    cuts = (
        (0.0, 0.0), (0.06, 0.0), (0.0, 0.06), (0.06, 0.06), (0.12, 0.0), (0.0, 0.12), (0.12, 0.12), (0.2, 0.0),
        (0.0, 0.2), (0.2, 0.2), (0.2, 0.1), (0.1, 0.2), (-0.1, -0.1), (0.0, -0.1), (0.3, 0.3), (0.0, 0.3),
    )  # fmt: skip

    def _pack_integers(self, scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
        return (scales | (minima << 4)).astype(np.uint8)

    def _unpack_integers(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return data & 15, data >> 4

    def pack(self, tensor: QuantizedTensor) -> np.ndarray:
        d, dmin, ints = self._scale_fields(tensor)
        return join(ints, pack_planes(self.blocks(tensor.codes), 2, 32), d, dmin)

    def unpack(self, data: np.ndarray) -> QuantizedTensor:
        ints, codes, d, dmin = self.fields(data, 16, 64, 2, 2)
        return QuantizedTensor(
            self, unpack_planes(codes, 2, 32).reshape(len(data), -1), self._scales_of(d, dmin, ints)
        )


class _SixBitMinima(_WithMinima):
    """8 groups of 32 with 6-bit scales and minima in 12 bytes.

    Bytes 0 … 3: scales 0 … 3, and in the top two bits the top two of scales 4 … 7. Bytes 4 … 7: the minima likewise.
    Bytes 8 … 11: the low four bits of scales 4 … 7, and above them of the minima.
    """

    group_size, limit = 32, 63
    cuts = (
        (0.0, 0.0), (0.03, 0.0), (0.0, 0.03), (0.03, 0.03), (0.07, 0.0), (0.0, 0.07), (0.07, 0.07), (-0.03, -0.03),
    )  # fmt: skip

    def _pack_integers(self, scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
        s, m = scales.astype(np.uint8), minima.astype(np.uint8)
        low = [x[..., :4] | (x[..., 4:] >> 4 << 6) for x in (s, m)]
        return np.concatenate((*low, (s[..., 4:] & 15) | (m[..., 4:] << 4)), axis=-1)

    def _unpack_integers(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, second, rest = np.split(data, 3, axis=-1)
        scales = np.concatenate((first & 63, (rest & 15) | (first >> 6 << 4)), axis=-1)
        minima = np.concatenate((second & 63, (rest >> 4) | (second >> 6 << 4)), axis=-1)
        return scales, minima


class Q4_K(_SixBitMinima):
    """4 bits: 4.5 bits per weight."""

    name, bits, block_bytes = "Q4_K", 4, 144

    def pack(self, tensor: QuantizedTensor) -> np.ndarray:
        return join(*self._scale_fields(tensor), pack_planes(self.blocks(tensor.codes), 4, 32))

    def unpack(self, data: np.ndarray) -> QuantizedTensor:
        d, dmin, ints, codes = self.fields(data, 2, 2, 12, 128)
        return QuantizedTensor(
            self, unpack_planes(codes, 4, 32).reshape(len(data), -1), self._scales_of(d, dmin, ints)
        )


class Q5_K(_SixBitMinima):
    """5 bits, the fifth ones in a field of their own: 5.5 bits per weight."""

    name, bits, block_bytes = "Q5_K", 5, 176

    def pack(self, tensor: QuantizedTensor) -> np.ndarray:
        codes = self.blocks(tensor.codes)
        return join(
            *self._scale_fields(tensor), pack_planes(codes >> 4, 1, 32), pack_planes(codes & 15, 4, 32)
        )

    def unpack(self, data: np.ndarray) -> QuantizedTensor:
        d, dmin, ints, high, low = self.fields(data, 2, 2, 12, 32, 128)
        codes = unpack_planes(low, 4, 32) | (unpack_planes(high, 1, 32) << 4)
        return QuantizedTensor(self, codes.reshape(len(data), -1), self._scales_of(d, dmin, ints))


class Q3_K(CentredGrid, SymmetricSuperBlock):
    """3 bits, 16 groups of 16 with signed 6-bit scales: 3.4375 bits per weight."""

    name, bits, group_size, block_bytes = "Q3_K", 3, 16, 110
    middle, reach, scale_limits = 4, 4, (-32, 31)
    starts = (0.7, 0.8, 0.88, 0.95, 1.02, 1.1, -0.75, -0.9, -1.0, -1.15, -1.33)

    def pack(self, tensor: QuantizedTensor) -> np.ndarray:
        codes = self.blocks(tensor.codes)
        d, ints = super_scales(self._by_super_block(tensor.scales.scale), self.scale_limits)
        ints = ints + 32
        scales = np.concatenate((pack_planes(ints & 15, 4, 8), pack_planes(ints >> 4, 2, 4)), axis=-1)
        return join(pack_planes(codes >> 2, 1, 32), pack_planes(codes & 3, 2, 32), scales, half_bytes(d))

    def unpack(self, data: np.ndarray) -> QuantizedTensor:
        high, low, scales, d = self.fields(data, 32, 64, 12, 2)
        codes = unpack_planes(low, 2, 32) | (unpack_planes(high, 1, 32) << 2)
        ints = unpack_planes(scales[..., :8], 4, 8) | (unpack_planes(scales[..., 8:], 2, 4) << 4)
        return self._tensor(codes, d, ints.astype(np.int64) - 32)


class Q6_K(CentredGrid, SymmetricSuperBlock):
    """6 bits, 16 groups of 16 with signed 8-bit scales: 6.5625 bits per weight."""

    name, bits, group_size, block_bytes = "Q6_K", 6, 16, 210
    middle, reach, scale_limits = 32, 32, (-128, 127)
    starts = (0.95, 0.965, 0.974, 0.982, 0.991, 1.0, 1.009, 1.018, 1.027, -0.99, -1.01, -1.03)

    def pack(self, tensor: QuantizedTensor) -> np.ndarray:
        codes = self.blocks(tensor.codes)
        d, ints = super_scales(self._by_super_block(tensor.scales.scale), self.scale_limits)
        low, high = pack_planes(codes & 15, 4, 64), pack_planes(codes >> 4, 2, 32)
        return join(low, high, ints.astype(np.int8).view(np.uint8), half_bytes(d))

    def unpack(self, data: np.ndarray) -> QuantizedTensor:
        low, high, ints, d = self.fields(data, 128, 64, 16, 2)
        codes = unpack_planes(low, 4, 64) | (unpack_planes(high, 2, 32) << 4)
        return self._tensor(codes, d, np.ascontiguousarray(ints).view(np.int8))
