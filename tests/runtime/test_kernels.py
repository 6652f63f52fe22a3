"""Every kernel of every instruction set against NumPy, and decoding against the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from helpers.isas import as_bf16, rounds_to_bf16
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_quant import _core
from qwen_quant.errors import QwenQuantError
from qwen_quant.grids.gguf import GRIDS, gguf_grid

ISAS = _core.cpu_isas()
TYPES = _core.matmul_types()
FLOATS = ["F32", "F16", "BF16"]
INT8_TYPES = list(GRIDS)
PACKED = [(isa, tensor_type) for isa in ISAS for tensor_type in _core.packed_types(isa)]

each_isa = pytest.mark.parametrize("isa", ISAS)
each_type = pytest.mark.parametrize("tensor_type", TYPES)


def block_size(tensor_type: str) -> int:
    """Weights in a block."""
    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor_type]][0])


def decoded_by_gguf(tensor_type: str, stored: np.ndarray) -> np.ndarray:
    values = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[tensor_type])
    return np.asarray(values, dtype=np.float32)


def quantized(tensor_type: str, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stored bytes and decoded weights of w [N, K], both by the gguf package where it can."""
    try:
        stored = np.ascontiguousarray(gguf.quants.quantize(w, gguf.GGMLQuantizationType[tensor_type]))
    except NotImplementedError:  # the package only reads them
        grid = gguf_grid(tensor_type)
        stored = grid.pack(grid.plain_rounding(w))
    return stored.view(np.uint8).reshape(-1), decoded_by_gguf(tensor_type, stored).reshape(w.shape)


# Where a block holds 16-bit floats.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}  # fmt: skip


def any_bytes(tensor_type: str, n_blocks: int, seed: int) -> np.ndarray:
    """Blocks [n_blocks, bytes] of every code and every scale, with 16-bit floats that are finite, and some tiny."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor_type]][1]
    stored = np.random.default_rng(seed).integers(0, 256, (n_blocks, size)).astype(np.uint8)
    for at in HALVES[tensor_type]:
        stored[:, at + 1] &= 0xBF  # below 2
        stored[: n_blocks // 5, at + 1] &= 0x80
    return stored


def activations_as_int8(x: np.ndarray) -> np.ndarray:
    """x [T, K] rounded to int8 with one scale per 32, and decoded again."""
    blocks = x.reshape(x.shape[0], -1, 32)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, 0).astype(np.float32)
    return (np.rint(blocks * inverse) * (largest / np.float32(127))).reshape(x.shape)


def activations_as_seen(x: np.ndarray, tensor_type: str, isa: str) -> np.ndarray:
    if rounds_to_bf16(tensor_type, isa):
        return as_bf16(x)
    return activations_as_int8(x) if tensor_type in INT8_TYPES else x


def test_scalar_is_always_there() -> None:
    assert ISAS[0] == "scalar"
    assert set(TYPES) == {*FLOATS, *INT8_TYPES}


@each_isa
@each_type
def test_decoding_is_exact(tensor_type: str, isa: str) -> None:
    rng = np.random.default_rng(0)
    k = 3 * max(block_size(tensor_type), 32)
    stored, decoded = quantized(tensor_type, rng.standard_normal((7, k)).astype(np.float32))
    ours = _core.dequantize(tensor_type, stored, decoded.size, isa)
    np.testing.assert_array_equal(ours.reshape(decoded.shape), decoded)


@each_isa
@pytest.mark.parametrize("tensor_type", INT8_TYPES)
def test_decoding_any_bytes(tensor_type: str, isa: str) -> None:
    """Codes that our quantizers do not write, -128 among them, and subnormal scales."""
    stored = any_bytes(tensor_type, 40, 1)
    decoded = decoded_by_gguf(tensor_type, stored).reshape(-1)
    np.testing.assert_array_equal(
        _core.dequantize(tensor_type, stored.reshape(-1), decoded.size, isa), decoded
    )


@each_isa
@each_type
@pytest.mark.parametrize(("n_rows", "k", "n_tokens"), [(1, 32, 1), (9, 96, 1), (11, 160, 6), (8, 512, 13)])
def test_matmul(tensor_type: str, isa: str, n_rows: int, k: int, n_tokens: int) -> None:
    rng = np.random.default_rng(n_rows)
    k *= max(block_size(tensor_type) // 32, 1)
    w = rng.standard_normal((n_rows, k)).astype(np.float32)
    x = rng.standard_normal((n_tokens, k)).astype(np.float32)
    stored, decoded = quantized(tensor_type, w)
    seen = activations_as_seen(x, tensor_type, isa)
    expected = seen.astype(np.float64) @ decoded.astype(np.float64).T
    y = _core.matmul(tensor_type, stored, n_rows, x, isa)
    np.testing.assert_allclose(y, expected, atol=2e-6 * k**0.5 * 4, rtol=1e-5)


def product(tensor_type: str, stored: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of any bytes [N, B, bytes] times x [T, K] rounded to int8, in float64: the product and the sum of its
    terms' magnitudes, both [T, N]."""
    w = decoded_by_gguf(tensor_type, stored).reshape(len(stored), -1).astype(np.float64)
    seen = activations_as_int8(x).astype(np.float64)
    return seen @ w.T, np.abs(seen) @ np.abs(w).T


@pytest.mark.parametrize(
    ("isa", "tensor_type", "packed"),
    [(isa, t, False) for isa in ISAS for t in INT8_TYPES] + [(isa, t, True) for isa, t in PACKED],
)
@settings(max_examples=12, deadline=None)
@given(
    n_rows=st.integers(1, 50),
    n_blocks=st.integers(1, 5),
    n_tokens=st.integers(1, 27),
    seed=st.integers(0, 999),
)
def test_any_weights_times_int8(
    tensor_type: str, isa: str, packed: bool, n_rows: int, n_blocks: int, n_tokens: int, seed: int
) -> None:
    """Any codes and scales, as packed rows and as stored; each token's product is the same whatever is beside it."""
    if seed % 4 == 0:
        n_blocks += 1152 // block_size(tensor_type)  # more than is taken at once for several tokens
    stored = any_bytes(tensor_type, n_rows * n_blocks, seed)
    k = n_blocks * block_size(tensor_type)
    x = np.random.default_rng(seed).standard_normal((n_tokens, k)).astype(np.float32)
    expected, magnitude = product(tensor_type, stored.reshape(n_rows, n_blocks, -1), x)
    y = _core.matmul(tensor_type, stored.reshape(-1), n_rows, x, isa, packed=packed)
    # Offsets are taken off after the product with unsigned codes, whose terms are up to three times as large.
    assert (np.abs(y - expected) <= 3e-6 * magnitude + 1e-6).all()
    for t in {0, n_tokens // 2, n_tokens - 1}:
        alone = _core.matmul(tensor_type, stored.reshape(-1), n_rows, x[t : t + 1], isa, packed=packed)
        np.testing.assert_array_equal(alone[0], y[t])


@pytest.mark.parametrize(
    ("isa", "tensor_type", "packed"),
    [(isa, t, False) for isa in ISAS for t in INT8_TYPES] + [(isa, t, True) for isa, t in PACKED],
)
def test_matmul_with_the_largest_codes(tensor_type: str, isa: str, packed: bool) -> None:
    """Sums of products must not saturate."""
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    for code in (0x80, 0x7F, 0xFF, 0x00):
        block = np.full(any_bytes(tensor_type, 1, 0).shape[1], code, np.uint8)
        for at in HALVES[tensor_type]:
            block[at : at + 2] = scale
        stored = np.tile(block, (33, 4))
        decoded = decoded_by_gguf(tensor_type, stored.reshape(132, -1)).reshape(33, -1).astype(np.float64)
        for run in (1, 2, 16, decoded.shape[1]):  # neighbours of one sign
            positive = np.arange(decoded.shape[1]) // run % 2 == 0
            x = np.where(positive, 1.0, -1.0).astype(np.float32) * np.float32([[1], [-1], [1], [1], [-1]])
            expected, magnitude = x.astype(np.float64) @ decoded.T, 2e-6 * np.abs(decoded).sum(axis=1)
            for n_tokens in (1, 5):
                y = _core.matmul(tensor_type, stored.reshape(-1), 33, x[:n_tokens], isa, packed=packed)
                assert (
                    np.abs(y - expected[:n_tokens]) <= magnitude + 1e-5 * np.abs(expected[:n_tokens])
                ).all()


# Where a block holds the scales of its groups.
SCALES = {
    "Q2_K": slice(0, 16), "Q3_K": slice(96, 108), "Q4_K": slice(4, 16), "Q5_K": slice(4, 16),
    "Q6_K": slice(192, 208), "IQ4_XS": slice(2, 8),
}  # fmt: skip


@pytest.mark.parametrize(("isa", "tensor_type"), [(isa, t) for isa, t in PACKED if t in SCALES])
def test_matmul_with_the_largest_codes_and_scales(tensor_type: str, isa: str) -> None:
    """Codes, scales and activations at their ends, in every combination: nothing may saturate on the way."""
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    ends = [0x80, 0x7F, 0xFF, 0x00]
    x = np.ones((6, 256), np.float32)
    for t, run in enumerate((1, 2, 8, 16, 32)):  # neighbours of one sign
        x[t + 1] = np.where(np.arange(256) // run % 2 == 0, 1.0, -1.0)
    x = np.concatenate([x, -x])
    for code in ends:
        stored = np.full((len(ends) ** 2, any_bytes(tensor_type, 1, 0).shape[1]), code, np.uint8)
        stored[:, SCALES[tensor_type]] = np.repeat(ends, len(ends))[:, None]
        stored[:, SCALES[tensor_type]][:, 1::2] = np.tile(ends, len(ends))[:, None]
        for at in HALVES[tensor_type]:
            stored[:, at : at + 2] = scale
        decoded = decoded_by_gguf(tensor_type, stored).astype(np.float64)
        bound = 3e-6 * np.abs(decoded).sum(axis=1) + 1e-3
        y = _core.matmul(tensor_type, stored.reshape(-1), len(stored), x, isa, packed=True)
        assert (np.abs(y - x.astype(np.float64) @ decoded.T) <= bound).all()
        assert (
            np.abs(y - _core.matmul(tensor_type, stored.reshape(-1), len(stored), x, "scalar")) <= bound
        ).all()
        for t in range(len(x)):
            alone = _core.matmul(tensor_type, stored.reshape(-1), len(stored), x[t : t + 1], isa, packed=True)
            np.testing.assert_array_equal(alone[0], y[t])


@each_isa
@pytest.mark.parametrize("k", [5, 8, 19])
@pytest.mark.parametrize("tensor_type", FLOATS)
def test_rows_of_any_length(tensor_type: str, k: int, isa: str) -> None:
    rng = np.random.default_rng(k)
    stored, decoded = quantized(tensor_type, rng.standard_normal((3, k)).astype(np.float32))
    x = rng.standard_normal((2, k)).astype(np.float32)
    expected = activations_as_seen(x, tensor_type, isa) @ decoded.T
    np.testing.assert_allclose(_core.matmul(tensor_type, stored, 3, x, isa), expected, atol=1e-5)
    np.testing.assert_array_equal(_core.dequantize(tensor_type, stored, 3 * k, isa), decoded.reshape(-1))


@each_isa
def test_quantized_activations(isa: str) -> None:
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((5, 64)) * 10.0 ** rng.integers(-6, 6, (5, 1))).astype(np.float32)
    x[1, :32] = 0
    x[2, :32] = 1e-38
    codes, scales = _core.quantize_activations(x, isa)
    np.testing.assert_array_equal(codes, _core.quantize_activations(x, "scalar")[0])
    assert np.abs(codes).max() == 127
    error = np.abs((codes.reshape(5, 2, 32) * scales[:, :, None]).reshape(5, 64) - x)
    assert (error <= np.repeat(scales, 32, axis=1) * 0.5001 + 1e-37).all()


@each_isa
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_lost(isa: str, bad: float) -> None:
    x = np.ones((1, 64), np.float32)
    x[0, 37] = bad
    stored, _ = quantized("Q4_0", np.ones((1, 64), np.float32))
    assert not np.isfinite(_core.matmul("Q4_0", stored, 1, x, isa)).any()
    gate = np.full((1, 11), bad, np.float32)
    if np.isnan(bad):
        assert np.isnan(_core.swiglu(gate, gate, isa)).all()


@each_isa
@pytest.mark.parametrize("n", [6, 16, 130])
def test_rms_norm(isa: str, n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.standard_normal((3, n)).astype(np.float32)
    weight = rng.standard_normal((1, n)).astype(np.float32)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(_core.rms_norm(x, weight, 1e-6, isa), expected, rtol=2e-6, atol=1e-7)


@each_isa
def test_swiglu(isa: str) -> None:
    gate = np.concatenate([np.linspace(-100, 100, 4001), [0.0, -1e30, 1e30]]).astype(np.float32)[None]
    up = np.full_like(gate, 1.5)
    g = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        expected = g / (1 + np.exp(-g)) * 1.5
    np.testing.assert_allclose(_core.swiglu(gate, up, isa), expected, rtol=1e-6, atol=1e-7)


@each_isa
@pytest.mark.parametrize(("n_q", "n_keys", "dim"), [(1, 1, 4), (2, 63, 32), (7, 200, 20), (12, 65, 128)])
def test_attention(isa: str, n_q: int, n_keys: int, dim: int) -> None:
    rng = np.random.default_rng(dim)
    q = rng.standard_normal((n_q, dim)).astype(np.float32)
    keys = rng.standard_normal((n_keys, dim)).astype(np.float32)
    values = rng.standard_normal((n_keys, dim)).astype(np.float32)
    scores = q.astype(np.float64) @ keys.astype(np.float16).astype(np.float64).T
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = weights @ values.astype(np.float16).astype(np.float64) / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(_core.attention(q, keys, values, isa), expected, atol=3e-6, rtol=1e-5)


def test_arguments_that_do_not_fit() -> None:
    data = np.zeros(18, np.uint8)
    with pytest.raises(QwenQuantError, match="weights do not fill"):
        _core.dequantize("Q4_0", data, 64)
    with pytest.raises(QwenQuantError, match="not supported"):
        _core.dequantize("IQ3_S", data, 256)
    with pytest.raises(QwenQuantError, match="not whole blocks"):
        _core.matmul("Q4_K", np.zeros(144, np.uint8), 2, np.zeros((1, 128), np.float32))
    with pytest.raises(QwenQuantError, match="scalar has no packed Q4_0"):
        _core.matmul("Q4_0", data, 1, np.zeros((1, 32), np.float32), "scalar", packed=True)
    with pytest.raises(QwenQuantError, match="unknown tensor type"):
        _core.dequantize("Q9", data, 32)
    with pytest.raises(QwenQuantError, match="cannot run on this CPU"):
        _core.dequantize("Q4_0", data, 32, "sse")
