"""GPTQ's integers as ONNX operators hold them: blocks along K of one size, each with a scale and a zero.

MatMulNBits reads `B` uint8 [N, blocks, block * bits / 8] with the first code in the low bits, FP32 scales [N, blocks]
and, packed like the codes, zeros [N, blocks]; without zeros they are 2^(bits - 1).
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_quant.errors import FormatError
from qwen_quant.grids.base import QuantizedTensor, Scales
from qwen_quant.grids.blocks import pack_planes
from qwen_quant.grids.gptq import IntGrid

BLOCKS = (128, 64, 32)  # the sizes that every reader has fast code for, the cheapest first


@dataclass(frozen=True)
class Blocks:
    """W[n, k] = scales[n, k // block] * (codes[n, k] - zeros[n, k // block]), of columns taken in `order`."""

    bits: int  # 4 or 8
    block: int
    codes: np.ndarray  # uint8 [N, K]
    scales: np.ndarray  # float32 [N, B]
    zeros: np.ndarray | None  # uint8 [N, B]; None: 2^(bits - 1) everywhere
    order: np.ndarray | None = (
        None  # int64 [K]: which column of the activation meets each column of the codes
    )

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        n, k = self.codes.shape
        return n, k

    @property
    def middle(self) -> int:
        """The zero of symmetric codes."""
        return int(2 ** (self.bits - 1))

    def packed_codes(self) -> np.ndarray:
        """uint8 [N, B, block * bits / 8]; a short last block is filled with zeros' codes."""
        n, k = self.codes.shape
        filling = self.scales.shape[1] * self.block - k
        codes = np.pad(self.codes, ((0, 0), (0, filling)), constant_values=self.middle)
        return pack_planes(codes, self.bits, 1).reshape(n, self.scales.shape[1], -1)

    def all_zeros(self) -> np.ndarray:
        """uint8 [N, B], written out where they are all in the middle."""
        return np.full(self.scales.shape, self.middle, np.uint8) if self.zeros is None else self.zeros

    def packed_zeros(self) -> np.ndarray:
        """uint8 [N, ceil(B * bits / 8)]."""
        zeros = self.all_zeros()
        odd = -zeros.shape[1] % (8 // self.bits)
        return pack_planes(np.pad(zeros, ((0, 0), (0, odd))), self.bits, 1)


def stored_bits(grid: IntGrid) -> int:
    """Bits of a code in the file: 2 and 3 bits are widened to 4, which every reader has."""
    return max(grid.bits, 4)


def block_size(grid: IntGrid, k: int) -> int:
    """The block that a matrix of `k` columns on `grid` is stored in: its group, or what divides it."""
    group = min(grid.columns_per_group(k), k)
    return next((size for size in BLOCKS if group % size == 0), BLOCKS[-1])


def stack_rows(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Matrices with the same columns as one, row below row; the caller knows that their groups are the same."""
    if len(tensors) == 1:
        return tensors[0]
    scales = Scales(
        np.concatenate([t.scales.scale for t in tensors]), np.concatenate([t.scales.offset for t in tensors])
    )
    codes = np.concatenate([t.codes for t in tensors])
    return QuantizedTensor(tensors[0].grid, codes, scales, tensors[0].group_index)


def to_blocks(where: str, tensor: QuantizedTensor, block: int | None = None) -> Blocks:
    """The same integers and scales in blocks (of a given size that divides the groups, or the largest there is).
    `where` names the tensor in errors.

    Act-order is undone by sorting the columns by their group; the activation has to be permuted alike (`order`).
    Raises FormatError when groups have other sizes than the grid says, or a scale is not finite.
    """
    grid, codes = tensor.grid, tensor.codes
    assert isinstance(grid, IntGrid)
    scale, zero = tensor.scales.scale, tensor.scales.offset  # [N, G]
    if not np.isfinite(scale).all():
        raise FormatError(f"{where}: a scale is not finite; quantize the model again")
    k = codes.shape[1]
    order = None
    if tensor.group_index is not None:
        order = _in_groups(where, tensor.group_index, grid, k)
        codes = codes[:, order]
    block = block or block_size(grid, k)
    n_blocks = -(-k // block)
    group = np.arange(n_blocks) * block // grid.columns_per_group(k)  # of each block
    bits = stored_bits(grid)
    symmetric = bool((zero == grid.middle).all())
    if symmetric and bits != grid.bits:
        codes = codes + np.uint8(2 ** (bits - 1) - grid.middle)
    return Blocks(
        bits,
        block,
        codes,
        np.ascontiguousarray(scale[:, group], dtype=np.float32),
        None if symmetric else zero[:, group].astype(np.uint8),
        order,
    )


def _in_groups(where: str, group_index: np.ndarray, grid: IntGrid, k: int) -> np.ndarray:
    """The columns sorted by group, int64 [K]."""
    order = np.argsort(group_index, kind="stable")
    expected = np.arange(k) // grid.columns_per_group(k)
    if not np.array_equal(group_index[order], expected):
        raise FormatError(
            f"{where}: its groups (g_idx) do not have {grid.columns_per_group(k)} columns each, which ONNX's "
            "blocks need; quantize without --desc-act, or export with --type F16"
        )
    return order.astype(np.int64)
