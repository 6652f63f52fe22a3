"""Rounding and the search for scales: on both array libraries, at FP16's ends, and never to the worse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_quant.errors import UsageError
from qwen_quant.grids.base import AffineGrid, QuantizedTensor, Scales, to_fp16
from qwen_quant.grids.blocks import BlockGrid
from qwen_quant.grids.gguf import GRIDS as BLOCK_GRIDS
from qwen_quant.grids.gguf import gguf_grid
from qwen_quant.grids.gptq import IntGrid
from qwen_quant.grids.iq4 import CodeBook
from qwen_quant.grids.super_blocks import SuperBlockGrid

GRIDS: list[AffineGrid] = [gguf_grid(name) for name in BLOCK_GRIDS] + [
    IntGrid(bits, group_size, sym)
    for bits in (2, 3, 4, 8)
    for group_size in (32, -1)
    for sym in (True, False)
]
EACH_GRID = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)


def width(grid: AffineGrid, at_least: int = 64) -> int:
    """A number of columns that the grid can store."""
    return max(at_least, grid.block_size) if isinstance(grid, BlockGrid) else at_least


def random_weights(grid: AffineGrid, seed: int, scale: float = 1.0) -> np.ndarray:
    """Heavy-tailed weights with a few groups of special shape."""
    rng = np.random.default_rng(seed)
    w = rng.standard_t(4, (6, width(grid, 96))).astype(np.float32)
    w[0, :32] = 0
    w[1, :32] = np.abs(w[1, :32])
    w[2, :32] = 3.0
    return (w * scale).astype(np.float32)


def decoded(grid: AffineGrid, w: Any, scales: Any) -> Any:
    columns = grid.spread(scales, w.shape[1])
    return grid.decode(grid.encode(w, columns), columns)


@EACH_GRID
@pytest.mark.parametrize("seed", range(3))
def test_compiled_sums_are_those_of_the_array_api(
    grid: AffineGrid, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.standard_t(4, (40, 7 if seed == 2 else 32)).astype(np.float32)
    importance = rng.gamma(0.3, 1.0, groups.shape).astype(np.float32)
    scale = (0.4 * rng.standard_normal((40, 5))).astype(np.float32)
    offset = rng.integers(0, grid.max_code + 1, (40, 5)).astype(np.float32)
    if grid.rule == "minimum":
        scale, offset = np.abs(scale), -offset / 4
    trials = Scales(scale, offset)
    error, sums = grid.error(groups, importance, trials), grid.sums(groups, importance, trials)
    monkeypatch.setattr("qwen_quant.grids.base.on_cpu", lambda array: False)
    np.testing.assert_allclose(error, grid.error(groups, importance, trials), rtol=1e-5)
    for name, found in vars(sums).items():
        expected = getattr(grid.sums(groups, importance, trials), name)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@EACH_GRID
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-6, 1e-2, 1.0, 50.0]))
def test_the_search_is_never_worse_than_plain_rounding(grid: AffineGrid, seed: int, scale: float) -> None:
    w = random_weights(grid, seed, scale)
    importance = np.random.default_rng(seed).gamma(0.3, 1.0, w.shape[1]).astype(np.float32)

    def error(scales: Any) -> np.ndarray:
        """Weighted squared error of all that is searched together: groups or super-blocks [N, G]."""
        gap = (importance * (w - decoded(grid, w, scales)) ** 2).astype(np.float64)
        together = grid.block_size if isinstance(grid, BlockGrid) else grid.columns_per_group(w.shape[1])
        return gap.reshape(len(w), -1, together).sum(axis=2)

    plain, searched = error(grid.fit(w)), error(grid.fit(w, importance))
    assert (searched <= plain * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_the_search_counts_each_column_of_a_short_group_once(bits: int) -> None:
    """A short last group is filled up to compute with it; the filling must not weigh."""
    grid = IntGrid(bits, 128, sym=True)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        w = rng.standard_normal((1, 160)).astype(np.float32)
        importance = np.ones(160, dtype=np.float32)
        errors = [float(np.sum((w - decoded(grid, w, grid.fit(w, i))) ** 2)) for i in (None, importance)]
        assert errors[1] <= errors[0] * (1 + 1e-5)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.bits < 8], ids=lambda grid: grid.name)
def test_the_search_pays(grid: AffineGrid) -> None:
    """At 8 bits the extremes decide, below that clipping them does better."""
    w = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
    importance = np.ones(256, dtype=np.float32)
    plain = np.square(w - decoded(grid, w, grid.fit(w))).sum()
    searched = np.square(w - decoded(grid, w, grid.fit(w, importance))).sum()
    assert searched < 0.97 * plain


@EACH_GRID
@pytest.mark.parametrize("searched", [False, True], ids=["plain", "searched"])
def test_numpy_and_torch_agree(grid: AffineGrid, searched: bool) -> None:
    w = random_weights(grid, 5)
    importance = np.random.default_rng(0).gamma(1.0, 1.0, w.shape[1]).astype(np.float32) if searched else None
    ours = grid.fit(w, importance)
    theirs = grid.fit(torch.from_numpy(w), None if importance is None else torch.from_numpy(importance))
    if importance is not None:  # sums in another order may choose another trial of equal worth
        gap = [
            (importance * np.square(w - decoded(grid, w, s))).mean()
            for s in (ours, type(ours)(theirs.scale.numpy(), theirs.offset.numpy()))
        ]
        assert gap[1] == pytest.approx(gap[0], rel=1e-2)
    else:
        np.testing.assert_array_equal(ours.scale, theirs.scale.numpy())
        np.testing.assert_array_equal(ours.offset, theirs.offset.numpy())
    columns = grid.spread(ours, w.shape[1])
    moved = type(columns)(torch.from_numpy(columns.scale), torch.from_numpy(columns.offset))
    codes = grid.encode(w, columns)
    np.testing.assert_array_equal(codes, grid.encode(torch.from_numpy(w), moved).numpy())
    np.testing.assert_array_equal(
        grid.decode(codes, columns), grid.decode(torch.from_numpy(codes), moved).numpy()
    )


@EACH_GRID
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-4, 1e-2, 1.0, 50.0]))
def test_rounding_stays_within_half_a_step(grid: AffineGrid, seed: int, scale: float) -> None:
    """Plain scales cover the group: no weight is further than half a step, and a step's rounding to FP16."""
    if isinstance(grid, SuperBlockGrid):
        scale = max(scale, 1e-2)  # their FP16 numbers are a hundred times smaller than scales
    w = random_weights(grid, seed, scale)
    w[1, :32] *= np.where(
        np.arange(32) % 2, 1, -1
    )  # a one-sided group is clipped where zero 0 is not on the grid
    scales = grid.fit(w)
    step = np.abs(grid.spread(scales, w.shape[1]).scale)
    slack = step * (0.5 + 2**-9 * 2**grid.bits)
    if grid.name in ("Q4_0", "Q5_0", "Q3_K", "Q6_K"):
        slack = step * 1.02  # the code that the other extreme would need does not exist
    if grid.name.startswith("IQ4"):
        slack = step * 14.5  # the level -127 that the other extreme would need does not exist, but 113
    if getattr(grid, "sym", True) is False:
        slack = step * (1.0 + 2**-9 * 2**grid.bits)  # the zero is rounded too
    if grid.name in ("Q4_1", "Q5_1"):
        slack = slack + np.abs(grid.spread(scales, w.shape[1]).offset) * 2**-10
    if isinstance(grid, SuperBlockGrid):
        slack = slack + np.abs(grid.spread(scales, w.shape[1]).offset) * 2**-10
    slack = slack + 2.0 ** (
        max(grid.bits, 8 * grid.name.startswith("IQ4")) - 25
    )  # FP16's coarse steps below 2^-14
    assert (np.abs(w - decoded(grid, w, scales)) <= slack + 1e-7).all()


@EACH_GRID
def test_groups_of_zeros_stay_zero(grid: AffineGrid) -> None:
    w = np.zeros((2, width(grid)), dtype=np.float32)
    for importance in (None, np.ones_like(w[0]), np.zeros_like(w[0])):
        scales = grid.fit(w, importance)
        assert np.isfinite(scales.scale).all() and np.isfinite(scales.offset).all()
        np.testing.assert_array_equal(decoded(grid, w, scales), w)


@EACH_GRID
@pytest.mark.parametrize("magnitude", [1e-30, 1e-8, 1e-5, 7e4, 1e6, 1e30])
def test_extremes_of_fp16(grid: AffineGrid, magnitude: float) -> None:
    """Scales saturate at FP16's ends: decoded weights stay finite and of the right sign or zero."""
    w = np.random.default_rng(0).uniform(-1, 1, (4, width(grid))).astype(np.float32) * np.float32(magnitude)
    scales = grid.fit(w)
    for stored in (scales.scale, scales.offset):
        assert np.isfinite(stored).all()
        if not isinstance(grid, SuperBlockGrid):
            np.testing.assert_array_equal(stored, to_fp16(stored))
    if isinstance(grid, SuperBlockGrid):
        grid.pack(QuantizedTensor(grid, np.zeros(w.shape, dtype=np.uint8), scales))
    assert (scales.scale != 0).all() or isinstance(grid, CodeBook)
    values = decoded(grid, w, scales)
    assert np.isfinite(values).all()
    if magnitude < 1e-7:
        assert np.abs(values).max() <= 2**-23


@EACH_GRID
def test_searches_of_extreme_weights_stay_finite(grid: AffineGrid) -> None:
    for magnitude in (1e-30, 1e5):
        w = np.random.default_rng(0).uniform(-1, 1, (4, width(grid))).astype(np.float32) * np.float32(
            magnitude
        )
        importance = np.full_like(w[0], 1e-12)
        assert np.isfinite(decoded(grid, w, grid.fit(w, importance))).all()


@EACH_GRID
def test_codes_and_zeros_are_storable(grid: AffineGrid) -> None:
    w = random_weights(grid, 1)
    tensor = grid.plain_rounding(w)
    assert tensor.codes.dtype == np.uint8
    assert tensor.codes.max() <= grid.max_code
    if isinstance(grid, IntGrid):
        zeros = tensor.scales.offset
        np.testing.assert_array_equal(zeros, np.round(zeros))
        assert zeros.min() >= 1 and zeros.max() <= grid.max_code


def test_rows_are_independent() -> None:
    """The search works through rows in pieces; what a row gets does not depend on the others."""
    grid = gguf_grid("Q4_0")
    w = np.random.default_rng(0).standard_normal((64, 8192)).astype(np.float32)
    importance = np.random.default_rng(1).gamma(1.0, 1.0, 8192).astype(np.float32)
    together = grid.fit(w, importance)
    np.testing.assert_array_equal(together.scale[40:42], grid.fit(w[40:42], importance).scale)


def test_fp16_saturates() -> None:
    x = np.array([1e9, -1e9, 65504, 1e-9, 1 + 2**-11], dtype=np.float32)
    np.testing.assert_array_equal(to_fp16(x), np.array([65504, -65504, 65504, 0, 1], dtype=np.float32))


@pytest.mark.parametrize(
    "arguments", [(5, 128), (4, 48), (4, 0), (16, 128), ("4", 128), (4.0, 128), (True, 128)]
)
def test_unknown_integer_grids(arguments: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match="choose one of"):
        IntGrid(*arguments)


def test_unknown_block_types() -> None:
    with pytest.raises(UsageError, match="Q4_0, Q4_1, Q5_0"):
        gguf_grid("Q4_7")
