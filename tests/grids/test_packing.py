"""Stored layouts, checked by bit loops written from the format's description and by gguf's decoder."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_quant.grids.base import QuantizedTensor, Scales
from qwen_quant.grids.gguf import GRIDS, BlockGrid, gguf_grid
from qwen_quant.grids.gptq import BITS, GROUP_SIZES, V1, V2, IntGrid, pack, pack_bits, unpack, unpack_bits
from qwen_quant.grids.super_blocks import super_scales

# Where the FP16 numbers of a block lie: the bytes that random blocks must not fill.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


def bit(words: np.ndarray, position: int) -> int:
    """Bit `position` of a sequence of int32 words, low bits first."""
    return (int(words[position // 32]) >> (position % 32)) & 1


def value(words: np.ndarray, index: int, bits: int) -> int:
    """The `index`-th `bits`-bit number of a dense little-endian stream."""
    return sum(bit(words, index * bits + b) << b for b in range(bits))


def random_tensor(grid: IntGrid, n: int, k: int, seed: int, shuffled: bool = False) -> QuantizedTensor:
    rng = np.random.default_rng(seed)
    groups = grid.n_groups(k)
    codes = rng.integers(0, 2**grid.bits, (n, k)).astype(np.uint8)
    zeros = rng.integers(1, 2**grid.bits, (n, groups)).astype(np.float32)
    scale = rng.standard_normal((n, groups)).astype(np.float16).astype(np.float32)
    index = None
    if shuffled and groups > 1:
        index = rng.permutation(np.arange(k) // grid.columns_per_group(k))
    return QuantizedTensor(grid, codes, Scales(scale, zeros), index)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    rows=st.sampled_from([32, 64, 96]),
    columns=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_bit_streams(bits: int, rows: int, columns: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    words = pack_bits(values, bits)
    assert words.dtype == np.int32
    assert words.shape == (rows * bits // 32, columns)
    np.testing.assert_array_equal(unpack_bits(words, bits), values)
    for row in range(0, rows, 7):
        for column in range(columns):
            assert value(words[:, column], row, bits) == values[row, column]


def test_three_bits_straddle_words() -> None:
    """Value 10 has two bits at the end of word 0 and one at the start of word 1, as AutoGPTQ packs it."""
    values = np.zeros((32, 1), dtype=np.uint8)
    values[10] = 7
    np.testing.assert_array_equal(pack_bits(values, 3).view(np.uint32)[:, 0], [0xC0000000, 1, 0])


def test_eight_values_of_four_bits_in_a_word() -> None:
    values = np.arange(32, dtype=np.uint8)[:, None] % 16
    np.testing.assert_array_equal(pack_bits(values, 4).view(np.uint32)[:, 0], [0x76543210, 0xFEDCBA98] * 2)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    k=st.sampled_from([128, 256]),
    checkpoint_format=st.sampled_from([V1, V2]),
    shuffled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_packed_layers_come_back(
    bits: int, group_size: int, k: int, checkpoint_format: str, shuffled: bool, seed: int
) -> None:
    grid = IntGrid(bits, group_size, sym=False)
    tensor = random_tensor(grid, 32, k, seed, shuffled)
    packed = pack(tensor, checkpoint_format)
    groups = grid.n_groups(k)
    assert (packed.qweight.dtype, packed.qweight.shape) == (np.int32, (k * bits // 32, 32))
    assert (packed.qzeros.dtype, packed.qzeros.shape) == (np.int32, (groups, 32 * bits // 32))
    assert (packed.scales.dtype, packed.scales.shape) == (np.float16, (groups, 32))
    assert (packed.g_idx.dtype, packed.g_idx.shape) == (np.int32, (k,))
    back = unpack(packed, grid, checkpoint_format)
    np.testing.assert_array_equal(back.codes, tensor.codes)
    np.testing.assert_array_equal(back.scales.scale, tensor.scales.scale)
    np.testing.assert_array_equal(back.scales.offset, tensor.scales.offset)
    np.testing.assert_array_equal(back.decode(), tensor.decode())
    assert (back.group_index is None) == (tensor.group_index is None)


@pytest.mark.parametrize("checkpoint_format", [V1, V2])
@pytest.mark.parametrize("bits", BITS)
def test_stored_numbers_mean_what_the_format_says(bits: int, checkpoint_format: str) -> None:
    """W[n, k] = scales[g, n] * (q - zero), with zero stored less one in v1: decoded here bit by bit."""
    grid = IntGrid(bits, 32, sym=False)
    tensor = random_tensor(grid, 32, 64, seed=bits, shuffled=True)
    packed = pack(tensor, checkpoint_format)
    expected = tensor.decode()
    for n in range(0, 32, 5):
        for k in range(0, 64, 3):
            group = packed.g_idx[k]
            q = value(packed.qweight[:, n], k, bits)
            zero = value(packed.qzeros[group], n, bits) + (checkpoint_format == V1)
            assert np.float32(packed.scales[group, n]) * np.float32(q - zero) == expected[n, k]


@pytest.mark.parametrize("bits", BITS)
def test_zero_of_zero_wraps_in_the_first_format(bits: int) -> None:
    """Readers of v1 add 1 within `bits` bits: a stored 2^bits - 1, which others write, stands for 0."""
    grid = IntGrid(bits, 32, sym=False)
    tensor = random_tensor(grid, 32, 32, seed=0)
    tensor.scales.offset[:] = 0
    packed = pack(tensor, V1)
    assert value(packed.qzeros[0], 3, bits) == 2**bits - 1
    np.testing.assert_array_equal(unpack(packed, grid, V1).scales.offset, tensor.scales.offset)


def ggufs_values(name: str, data: np.ndarray) -> np.ndarray:
    """Bytes as the gguf package decodes them."""
    values: np.ndarray = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    return values


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(GRIDS)),
    n=st.integers(1, 4),
    blocks=st.integers(1, 3),
    scale=st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 300.0, 1e9]),
    searched=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_decode_as_gguf_decodes_them(
    name: str, n: int, blocks: int, scale: float, searched: bool, seed: int
) -> None:
    grid, rng = gguf_grid(name), np.random.default_rng(seed)
    k = grid.block_size * blocks
    w = (rng.standard_normal((n, k)) * scale).astype(np.float32)
    importance = rng.gamma(0.5, 1.0, k).astype(np.float32)
    tensor = grid.searched_rounding(w, importance) if searched else grid.plain_rounding(w)
    data = grid.pack(tensor)
    assert data.dtype == np.uint8
    assert data.shape == (n, blocks * grid.block_bytes)
    theirs = ggufs_values(name, data)
    assert np.isfinite(theirs).all()
    np.testing.assert_array_equal(tensor.decode(), theirs)
    back = grid.unpack(data)
    np.testing.assert_array_equal(back.codes, tensor.codes)
    np.testing.assert_array_equal(back.decode(), theirs)


@pytest.mark.parametrize("name", GRIDS)
def test_any_bytes_unpack_and_pack_to_the_same_values(name: str) -> None:
    """Where a super-block can be written in more ways than one, its bytes may change; no value does."""
    grid = gguf_grid(name)
    data = np.random.default_rng(0).integers(0, 256, (3, 40 * grid.block_bytes)).astype(np.uint8)
    for offset in HALVES[name]:
        # A tame FP16 exponent: no NaN, whose bits need not survive.
        data.reshape(3, 40, grid.block_bytes)[..., offset + 1] &= 0xBF
    tensor = grid.unpack(data)
    expected = ggufs_values(name, data)
    np.testing.assert_array_equal(tensor.decode(), expected)
    again = grid.pack(tensor)
    np.testing.assert_array_equal(ggufs_values(name, again), expected)
    if grid.group_size == grid.block_size:
        np.testing.assert_array_equal(again, data)


@pytest.mark.parametrize("name", GRIDS)
def test_block_sizes_are_ggufs(name: str) -> None:
    grid: BlockGrid = gguf_grid(name)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert (grid.block_size, grid.block_bytes) == (block, size)
    assert grid.bits_per_weight == 8 * size / block


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(0, 0x7BFF),
    limits=st.sampled_from([(0, 15), (0, 63), (-32, 31), (-128, 127)]),
    seed=st.integers(0, 99),
)
def test_super_scales_are_found_again(bits: int, limits: tuple[int, int], seed: int) -> None:
    """From the products alone, for every FP16 number and any integers."""
    rng = np.random.default_rng(seed)
    d = np.full((2, 3), bits, dtype="<u2").view("<f2").astype(np.float32) * (-1) ** seed
    ints = rng.integers(limits[0], limits[1] + 1, (2, 3, 8)) * rng.integers(0, 2, (2, 3, 1))
    if limits[0] == 0:
        d = np.abs(d)
    products = d[..., None] * ints.astype(np.float32)
    found, integers = super_scales(products, limits)
    np.testing.assert_array_equal(found, found.astype("<f2").astype(np.float32))
    np.testing.assert_array_equal(found[..., None] * integers, products)
    assert integers.min() >= limits[0] and integers.max() <= limits[1]


def test_scales_that_are_no_products_are_refused() -> None:
    for products in ([1.0, np.pi], [1.0, 64.0], [2.0**-26, 1.0]):
        with pytest.raises(ValueError, match="not integers times"):
            super_scales(np.array([[products]], dtype=np.float32), (0, 63))
