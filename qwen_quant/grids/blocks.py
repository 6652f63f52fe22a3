"""GGUF's blocks as bytes: what all of its quantized types have in common.

A row of K weights is stored as K / block_size blocks of `block_bytes` bytes. Codes of fewer than 8 bits lie in bit
planes: the bytes of a run of codes hold that run in their low bits, the next run in the bits above, and so on.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from qwen_quant.grids.base import AffineGrid, QuantizedTensor

BLOCK = 32  # weights in a block of the simple types


class BlockGrid(AffineGrid):
    """A grid with GGUF's blocks; `pack` and `unpack` are its bytes."""

    group_size = BLOCK
    block_size = BLOCK  # weights per block: one group, or several that share a super-scale
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return self.block_bytes * 8 / self.block_size

    @abstractmethod
    def pack(self, tensor: QuantizedTensor) -> np.ndarray:
        """The stored bytes, uint8 [N, K / block_size * block_bytes]."""

    @abstractmethod
    def unpack(self, data: np.ndarray) -> QuantizedTensor:
        """The inverse of `pack`, from bytes [N, K / block_size * block_bytes]."""

    def blocks(self, values: np.ndarray) -> np.ndarray:
        """Values [N, K] as [N, B, block_size]."""
        return values.reshape(len(values), -1, self.block_size)

    def fields(self, data: np.ndarray, *sizes: int) -> list[np.ndarray]:
        """Stored bytes cut into the fields of each block, of `sizes` bytes: each [N, B, size]."""
        blocks = np.ascontiguousarray(data).reshape(data.shape[0], -1, self.block_bytes)
        return np.split(blocks, np.cumsum(sizes)[:-1], axis=-1)


def pack_planes(values: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Values [..., C] below 2^bits as bytes [..., C * bits / 8]; `run` values lie side by side in as many bytes."""
    lead, per_byte = values.shape[:-1], 8 // bits
    runs = values.astype(np.uint8).reshape(*lead, -1, per_byte, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    packed: np.ndarray = np.bitwise_or.reduce(runs << shifts, axis=-2)
    return packed.reshape(*lead, -1)


def unpack_planes(data: np.ndarray, bits: int, run: int) -> np.ndarray:
    """The inverse of `pack_planes`: bytes [..., D] to uint8 [..., D * 8 / bits]."""
    lead = data.shape[:-1]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = (data.reshape(*lead, -1, 1, run) >> shifts) & np.uint8(2**bits - 1)
    return runs.reshape(*lead, -1)


def half_bytes(values: np.ndarray) -> np.ndarray:
    """[N, B] float32 as the bytes of FP16 [N, B, 2]."""
    return np.ascontiguousarray(values, dtype="<f2").view(np.uint8).reshape(*values.shape, 2)


def from_half(data: np.ndarray) -> np.ndarray:
    """[N, B, 2] bytes as float32 [N, B]."""
    return np.ascontiguousarray(data).view("<f2")[..., 0].astype(np.float32)


def join(*parts: np.ndarray) -> np.ndarray:
    """Fields [N, B, bytes] side by side as rows of bytes [N, B * block_bytes]."""
    return np.concatenate(parts, axis=-1).reshape(len(parts[0]), -1)
