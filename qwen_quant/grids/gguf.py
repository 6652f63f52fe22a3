"""GGUF's simple block types as grids, and their byte layout (ggml's block_q4_0, block_q4_1, block_q8_0).

Blocks of 32 weights along K. Q4_0: FP16 d, 16 bytes; w = d * (q - 8). Q4_1: FP16 d and m; w = d * q + m.
Q8_0: FP16 d, 32 int8; w = d * q. In the 4-bit types byte i holds weight i (low half) and i + 16 (high half).
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from qwen_quant.errors import UsageError
from qwen_quant.grids.base import (
    SHRINK,
    AffineGrid,
    Array,
    CentredGrid,
    QuantizedTensor,
    Scales,
    fp16_scale,
    namespace,
    ratio,
    to_fp16,
)

BLOCK = 32


class BlockGrid(AffineGrid):
    """An affine grid with GGUF's blocks; `pack` and `unpack` are its bytes."""

    group_size = BLOCK
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return self.block_bytes * 8 / BLOCK

    @abstractmethod
    def pack(self, tensor: QuantizedTensor) -> np.ndarray:
        """The stored bytes, uint8 [N, K / 32 * block_bytes]."""

    @abstractmethod
    def unpack(self, data: np.ndarray) -> QuantizedTensor:
        """The inverse of `pack`, from bytes [N, K / 32 * block_bytes]."""

    def _blocks(self, data: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(data).reshape(data.shape[0], -1, self.block_bytes)  # [N, G, block_bytes]


class _Symmetric(CentredGrid, BlockGrid):
    """w = d * (q - middle), d of either sign."""

    middle: int
    reach: int  # the code distance that the extreme value is given

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
        return [self._scales(base * (sign * shrink)) for sign in (1.0, -1.0) for shrink in SHRINK]

    def refit(self, groups: Array, importance: Array, codes: Array, scales: Scales) -> Scales:
        xp = namespace(groups)
        centred = codes - float(self.middle)
        norm = xp.sum(importance * centred * centred, axis=1, keepdims=True)
        dot = xp.sum(importance * centred * groups, axis=1, keepdims=True)
        return self._scales(ratio(dot, norm))


class Q4_0(_Symmetric):
    """4 bits, one FP16 scale per 32 weights: 4.5 bits per weight."""

    name, bits, middle, reach, block_bytes = "Q4_0", 4, 8, 8, 18

    def pack(self, tensor: QuantizedTensor) -> np.ndarray:
        return _join(_half_bytes(tensor.scales.scale), _nibbles(tensor.codes))

    def unpack(self, data: np.ndarray) -> QuantizedTensor:
        blocks = self._blocks(data)
        return QuantizedTensor(
            self, _from_nibbles(blocks[..., 2:]), self._scales(_from_half(blocks[..., :2]))
        )


class Q8_0(_Symmetric):
    """8 bits, one FP16 scale per 32 weights: 8.5 bits per weight."""

    name, bits, middle, reach, block_bytes = "Q8_0", 8, 128, 127, 34

    def plain(self, groups: Array) -> Scales:
        xp = namespace(groups)
        return self._scales(xp.max(xp.abs(groups), axis=1, keepdims=True) / self.reach)

    def pack(self, tensor: QuantizedTensor) -> np.ndarray:
        n = tensor.codes.shape[0]
        signed = (tensor.codes.astype(np.int16) - self.middle).astype(np.int8).view(np.uint8)
        return _join(_half_bytes(tensor.scales.scale), signed.reshape(n, -1, BLOCK))

    def unpack(self, data: np.ndarray) -> QuantizedTensor:
        blocks = self._blocks(data)
        signed = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).astype(np.int16)
        codes = (signed + self.middle).astype(np.uint8).reshape(len(blocks), -1)
        return QuantizedTensor(self, codes, self._scales(_from_half(blocks[..., :2])))


class Q4_1(BlockGrid):
    """4 bits, an FP16 scale and minimum per 32 weights: 5 bits per weight."""

    name, bits, block_bytes = "Q4_1", 4, 20

    def value(self, codes: Array, scale: Array, offset: Array) -> Array:
        return scale * codes + offset

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
        cuts = (-0.02, 0.0, 0.03, 0.06, 0.1)
        return [self._covering(groups, low, high) for low in cuts for high in cuts]

    def refit(self, groups: Array, importance: Array, codes: Array, scales: Scales) -> Scales:
        # Weighted linear regression of the weights on their codes.
        xp = namespace(groups)

        def mean(x: Array) -> Array:
            return ratio(xp.sum(importance * x, axis=1, keepdims=True), total)

        total = xp.sum(importance, axis=1, keepdims=True)
        q_mean, w_mean = mean(codes), mean(groups)
        variance = mean((codes - q_mean) ** 2)
        scale = fp16_scale(ratio(mean((codes - q_mean) * (groups - w_mean)), variance))
        return Scales(scale, to_fp16(w_mean - scale * q_mean))

    def pack(self, tensor: QuantizedTensor) -> np.ndarray:
        scales = tensor.scales
        return _join(_half_bytes(scales.scale), _half_bytes(scales.offset), _nibbles(tensor.codes))

    def unpack(self, data: np.ndarray) -> QuantizedTensor:
        blocks = self._blocks(data)
        scales = Scales(_from_half(blocks[..., :2]), _from_half(blocks[..., 2:4]))
        return QuantizedTensor(self, _from_nibbles(blocks[..., 4:]), scales)


GRIDS: dict[str, type[BlockGrid]] = {"Q4_0": Q4_0, "Q4_1": Q4_1, "Q8_0": Q8_0}


def gguf_grid(type_name: str) -> BlockGrid:
    """The grid of a GGUF type name. Raises UsageError for types that are not grids."""
    if type_name not in GRIDS:
        raise UsageError(f"type {type_name!r} is not a quantized GGUF type; choose one of {', '.join(GRIDS)}")
    return GRIDS[type_name]()


def _half_bytes(values: np.ndarray) -> np.ndarray:
    """[N, G] float32 as the bytes of FP16 [N, G, 2]."""
    return np.ascontiguousarray(values, dtype="<f2").view(np.uint8).reshape(*values.shape, 2)


def _from_half(data: np.ndarray) -> np.ndarray:
    """[N, G, 2] bytes as float32 [N, G]."""
    return np.ascontiguousarray(data).view("<f2")[..., 0].astype(np.float32)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes [N, K] as bytes [N, G, 16]."""
    blocks = codes.reshape(len(codes), -1, 2, BLOCK // 2)
    return blocks[:, :, 0] | (blocks[:, :, 1] << 4)


def _from_nibbles(data: np.ndarray) -> np.ndarray:
    """Bytes [N, G, 16] as codes [N, K]."""
    return np.concatenate((data & 15, data >> 4), axis=-1).reshape(len(data), -1)


def _join(*parts: np.ndarray) -> np.ndarray:
    """Fields [N, G, bytes] side by side as rows of bytes [N, G * block_bytes]."""
    return np.concatenate(parts, axis=-1).reshape(len(parts[0]), -1)
