"""The integer grids of GPTQ checkpoints (2, 3, 4 and 8 bits) and their packing.

W[n, k] = scale[g, n] * (q - zero[g, n]). Layout as AutoGPTQ defined it: `qweight` int32 [K * bits / 32, N] is a
little-endian bit stream along K, `qzeros` int32 [G, N * bits / 32] one along N, `scales` FP16 [G, N], `g_idx`
int32 [K]. Format v1 ("gptq") stores zero - 1, v2 ("gptq_v2") stores zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_quant.errors import UsageError
from qwen_quant.grids.base import (
    Array,
    CentredGrid,
    QuantizedTensor,
    Scales,
    Sums,
    fp16_scale,
    namespace,
    ratio,
)
from qwen_quant.grids.separate import SHRINK, SeparateGroups

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 32, 64, 128)
V1, V2 = GPTQ_FORMATS = ("gptq", "gptq_v2")


class IntGrid(CentredGrid, SeparateGroups):
    """`bits`-bit integers, symmetric (zero fixed at the middle) or with an integer zero per group."""

    def __init__(self, bits: int = 4, group_size: int = 128, sym: bool = True) -> None:
        if not isinstance(bits, int) or bits not in BITS:
            raise UsageError(f"--bits {bits!r}: not supported; choose one of {', '.join(map(str, BITS))}")
        if not isinstance(group_size, int) or group_size not in GROUP_SIZES:
            raise UsageError(f"--group-size {group_size!r}: not supported; choose one of {GROUP_SIZES}")
        self.bits, self.group_size, self.sym = bits, group_size, sym
        self.name = f"int{bits}" + ("" if group_size == -1 else f"-g{group_size}") + ("" if sym else "-asym")

    @property
    def middle(self) -> int:
        """The zero of a symmetric grid."""
        return 2 ** (self.bits - 1)

    @property
    def bits_per_weight(self) -> float:
        return self.bits + (0.0 if self.group_size == -1 else (16 + self.bits) / self.group_size)

    def plain(self, groups: Array) -> Scales:
        return self._covering(groups, 1.0)

    def _covering(self, groups: Array, shrink: float) -> Scales:
        """Scales for the group's range times `shrink` (Frantar et al. 2022's find_params)."""
        xp = namespace(groups)
        if self.sym:
            top = xp.max(xp.abs(groups), axis=1, keepdims=True) * shrink
            scale = fp16_scale(top * (2.0 / self.max_code))
            return Scales(scale, xp.full_like(scale, float(self.middle)))
        high = xp.clip(xp.max(groups, axis=1, keepdims=True), 0.0, None) * shrink
        low = xp.clip(xp.min(groups, axis=1, keepdims=True), None, 0.0) * shrink
        scale = fp16_scale((high - low) / self.max_code)
        return Scales(scale, self._zero(-low / scale))

    def _zero(self, position: Array) -> Array:
        # Format v1 stores zero - 1; a zero of 0 would wrap there, so it is not on the grid.
        xp = namespace(position)
        return xp.clip(xp.round(position), 1.0, float(self.max_code))

    def candidates(self, groups: Array) -> list[Scales]:
        trials = [self._covering(groups, shrink) for shrink in SHRINK]
        if self.sym:
            # A negative scale turns the longer negative side of the codes to the positive weights.
            trials += [Scales(-trial.scale, trial.offset) for trial in trials]
        return trials

    def refit(self, sums: Sums, scales: Scales) -> Scales:
        scale = fp16_scale(ratio(sums.product, sums.square))
        if self.sym:
            return Scales(scale, scales.offset)
        # The mean of code - w / scale, of which the old zero is a part of the code.
        gap = ratio(sums.level - sums.value / scale, sums.weight)
        return Scales(scale, self._zero(scales.offset + gap))


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 values [R, C] into int32 [R * bits / 32, C]: a little-endian bit stream down each column.

    3-bit values straddle words (32 of them fill 3 words). R must be a multiple of 32.
    """
    rows, columns = values.shape
    slots = values.reshape(-1, 32, columns)  # 32 values fill `bits` words
    words = np.zeros((rows // 32, bits, columns), dtype="<u4")
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = slots[:, i].astype("<u4")
        words[:, word] |= value << np.uint32(shift)
        if shift + bits > 32:
            words[:, word + 1] |= value >> np.uint32(32 - shift)
    return words.view("<i4").reshape(-1, columns)


def unpack_bits(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack_bits`: int32 [R * bits / 32, C] to uint8 [R, C]."""
    columns = words.shape[1]
    slots = np.ascontiguousarray(words, dtype="<i4").view("<u4").reshape(-1, bits, columns)
    values = np.empty((len(slots), 32, columns), dtype=np.uint8)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = slots[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            value |= slots[:, word + 1] << np.uint32(32 - shift)
        values[:, i] = value & np.uint32((1 << bits) - 1)
    return values.reshape(-1, columns)


@dataclass(frozen=True)
class PackedLinear:
    """The four stored arrays of one quantized linear layer."""

    qweight: np.ndarray  # int32 [K * bits / 32, N]
    qzeros: np.ndarray  # int32 [G, N * bits / 32]
    scales: np.ndarray  # float16 [G, N]
    g_idx: np.ndarray  # int32 [K]


def pack(tensor: QuantizedTensor, checkpoint_format: str = V1) -> PackedLinear:
    """The stored form of a NumPy QuantizedTensor on an IntGrid."""
    grid, k = tensor.grid, tensor.codes.shape[1]
    zeros = np.ascontiguousarray(tensor.scales.offset.T).astype(np.int64) - (
        checkpoint_format == V1
    )  # [G, N]
    index = tensor.group_index
    if index is None:
        index = np.arange(k) // grid.columns_per_group(k)
    return PackedLinear(
        qweight=pack_bits(np.ascontiguousarray(tensor.codes.T), grid.bits),
        qzeros=np.ascontiguousarray(pack_bits(zeros.T.astype(np.uint8), grid.bits).T),
        scales=np.ascontiguousarray(tensor.scales.scale.T).astype(np.float16),
        g_idx=np.asarray(index, dtype=np.int32),
    )


def unpack(packed: PackedLinear, grid: IntGrid, checkpoint_format: str = V1) -> QuantizedTensor:
    """The inverse of `pack`; `group_index` is None when the stored groups are in order."""
    codes = np.ascontiguousarray(unpack_bits(packed.qweight, grid.bits).T)
    zeros = unpack_bits(np.ascontiguousarray(packed.qzeros.T), grid.bits)  # [N, G]
    # The addition wraps as AutoGPTQ's does: a stored 2^bits - 1 stands for zero 0.
    zeros = (zeros.astype(np.int64) + (checkpoint_format == V1)) & grid.max_code
    scale = np.ascontiguousarray(packed.scales.T).astype(np.float32)
    k = codes.shape[1]
    in_order = np.array_equal(packed.g_idx, np.arange(k) // grid.columns_per_group(k))
    return QuantizedTensor(
        grid,
        codes,
        Scales(scale, zeros.astype(np.float32)),
        None if in_order else packed.g_idx.astype(np.int64),
    )
