"""The key/value cache's grids: what they cost, how far they round, and that NumPy and torch agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_quant.errors import FormatError, UsageError
from qwen_quant.grids.kv import (
    ChannelGroups,
    Half,
    KVGrid,
    Qwen1Int8,
    TokenGroups,
    TokenRange,
    byte_scales,
    hadamard,
    scale_bytes,
)
from qwen_quant.grids.kv_file import FILE_NAME, read_kv_file, write_kv_file
from qwen_quant.grids.kv_layout import NAMES, KVCacheSpec, KVLayer, KVLayout, uncalibrated

GRIDS: list[KVGrid] = [
    Half(),
    TokenGroups(8),
    TokenGroups(4),
    ChannelGroups(4),
    TokenRange(4),
    Qwen1Int8(),
]


def vectors(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.name)
def test_numpy_and_torch_store_the_same(grid: KVGrid) -> None:
    x = vectors(2, 3, 64, 64)
    ours, theirs = grid.encode(x), grid.encode(torch.from_numpy(x))
    np.testing.assert_array_equal(ours.codes, theirs.codes.numpy())
    np.testing.assert_array_equal(grid.decode(ours), grid.decode(theirs).numpy())
    assert grid.decode(ours).shape == x.shape


@pytest.mark.parametrize(("bits", "within"), [(8, 1 / 127 * 1.13), (4, 1 / 4)])
def test_int_grids_stay_near(bits: int, within: float) -> None:
    grid = TokenGroups(bits)
    x = vectors(200, 64) * np.exp(3 * vectors(200, 1, seed=1))
    groups = x.reshape(200, 2, 32)
    gap = np.abs(grid.decode(grid.encode(x)).reshape(200, 2, 32) - groups)
    assert (gap <= within * np.abs(groups).max(-1, keepdims=True)).all()


def test_the_search_is_never_worse_than_covering() -> None:
    x = vectors(300, 32)
    grid = TokenGroups(4)
    scale = byte_scales(scale_bytes(np.abs(x).max(-1, keepdims=True) / 8))
    covering = (np.clip(np.round(x / scale + 7.5), 0, 15) - 7.5) * scale
    found = grid.decode(grid.encode(x))
    error = ((found - x) ** 2).sum(-1)
    assert (error <= ((covering - x) ** 2).sum(-1) + 1e-6).all()
    assert error.sum() < 0.97 * ((covering - x) ** 2).sum()


@given(st.floats(2.0**-19, 3000, width=32))
@settings(max_examples=200, deadline=None)
def test_a_scale_byte_covers_and_is_near(x: float) -> None:
    stored = float(byte_scales(scale_bytes(np.array([x], dtype=np.float32)))[0])
    assert x <= stored <= x * 1.1251


def test_extremes_stay_finite() -> None:
    for grid in GRIDS:
        for value in (0.0, 1e-30, 6e4, -6e4):
            x = np.full((32, 64), value, dtype=np.float32)
            found = grid.decode(grid.encode(x))
            assert np.isfinite(found).all(), grid.name
            if grid.bits == 16 or value == 0.0:
                np.testing.assert_allclose(found, x, atol=1e-5)


def test_bytes_count_scales() -> None:
    layers = tuple(KVLayer(KVLayout(TokenGroups(8)), KVLayout(TokenGroups(4))) for _ in range(3))
    # int8: 64 codes and 2 scales; int4: 32 bytes and 2 scales
    assert KVCacheSpec("x", layers).bytes_per_token(2, 64) == 3 * 2 * (66 + 34)
    half = uncalibrated("f16", [None] * 3).bytes_per_token(8, 128)
    assert half == 3 * 2 * 8 * 128 * 2
    assert uncalibrated("int8", [None] * 3).bytes_per_token(8, 128) <= 0.53 * half
    assert uncalibrated("int4", [None] * 3).bytes_per_token(8, 128) <= 0.30 * half


@pytest.mark.parametrize("dim", [64, 96, 128, 6])
def test_hadamard_is_its_own_inverse_and_keeps_products(dim: int) -> None:
    a, b = vectors(5, dim), vectors(5, dim, seed=1)
    np.testing.assert_allclose(hadamard(hadamard(a)), a, atol=1e-5)
    np.testing.assert_allclose((hadamard(a) * hadamard(b)).sum(-1), (a * b).sum(-1), atol=1e-4)


def test_changes_of_basis_are_undone() -> None:
    x, centre = vectors(2, 10, 64), 500 * vectors(2, 1, 64, seed=1)
    balance = np.exp(0.3 * vectors(2, 64, seed=2))
    layout = KVLayout(TokenGroups(8), balance=balance, hadamard=True)
    found = layout.decode(layout.encode(x + centre, centre), centre)
    assert np.abs(found - x - centre).max() < 0.1
    without = KVLayout(TokenGroups(8))
    assert np.abs(without.decode(without.encode(x + centre, None), None) - x - centre).max() > 1


def test_qwen1_is_its_quantize_cache_v() -> None:
    """The published function, for one token of one head: truncated, between the extremes of the head."""
    x = vectors(1, 64)
    scale = np.float16((x.max() - x.min()) / 255).astype(np.float32)
    zero = np.float16(-x.min() / scale).astype(np.float32)
    codes = np.clip(x / scale + zero, 0, 255).astype(np.uint8)
    np.testing.assert_allclose(Qwen1Int8().decode(Qwen1Int8().encode(x)), scale * (codes - zero), rtol=1e-6)


def test_a_layout_comes_back_from_its_file(tmp_path: Path) -> None:
    centre, balance = vectors(2, 64), np.exp(vectors(2, 64, seed=1))
    layers = (
        KVLayer(KVLayout(TokenGroups(4), centre, balance, True), KVLayout(TokenGroups(8), None, None, False)),
        KVLayer(KVLayout(Half()), KVLayout(TokenGroups(4), centre, None, True)),
    )
    path = tmp_path / FILE_NAME
    write_kv_file(path, KVCacheSpec("auto", layers), 2, 64, {"kld": 0.5})
    found, record = read_kv_file(path, 2, 2, 64)
    assert record["kld"] == 0.5
    for mine, theirs in zip(layers, found.layers, strict=True):
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert (a.grid.name, a.hadamard) == (b.grid.name, b.hadamard)
            for x, y in ((a.centre, b.centre), (a.balance, b.balance)):
                np.testing.assert_array_equal(x, y) if x is not None else None
                assert (x is None) == (y is None)
    with pytest.raises(
        FormatError, match=r"kv_cache.safetensors: key_bits is \[2\] where this model needs \[3\]"
    ):
        read_kv_file(path, 3, 2, 64)
    with pytest.raises(FormatError, match="qwen-quant kv"):
        read_kv_file(tmp_path / "none.safetensors", 2, 2, 64)


def test_layouts_for_measuring_are_not_stored(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="for measuring only"):
        write_kv_file(tmp_path / "x.safetensors", uncalibrated("qwen1", [None]), 2, 64, {})
    assert not list(tmp_path.iterdir())


def test_names() -> None:
    for name in NAMES:
        assert len(uncalibrated(name, [None, None]).layers) == 2
    with pytest.raises(UsageError, match="--kv-cache fp8"):
        uncalibrated("fp8", [None])
