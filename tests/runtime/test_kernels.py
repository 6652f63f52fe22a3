"""Every kernel of every instruction set against NumPy, and decoding against the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from qwen_quant import _core
from qwen_quant.errors import QwenQuantError

ISAS = _core.cpu_isas()
TYPES = _core.matmul_types()
INT8_TYPES = ["Q8_0", "Q4_0", "Q4_1"]
PACKED = [(isa, tensor_type) for isa in ISAS for tensor_type in _core.packed_types(isa)]

each_isa = pytest.mark.parametrize("isa", ISAS)
each_type = pytest.mark.parametrize("tensor_type", TYPES)


def quantized(tensor_type: str, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stored bytes and decoded weights of w [N, K], both by the gguf package."""
    quantization = gguf.GGMLQuantizationType[tensor_type]
    stored = np.ascontiguousarray(gguf.quants.quantize(w, quantization))
    decoded = gguf.quants.dequantize(stored, quantization).reshape(w.shape).astype(np.float32)
    return stored.view(np.uint8).reshape(-1), decoded


def activations_as_int8(x: np.ndarray) -> np.ndarray:
    """x [T, K] rounded to int8 with one scale per 32, and decoded again."""
    blocks = x.reshape(x.shape[0], -1, 32)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, 0).astype(np.float32)
    return (np.rint(blocks * inverse) * (largest / np.float32(127))).reshape(x.shape)


def test_scalar_is_always_there() -> None:
    assert ISAS[0] == "scalar"
    assert set(TYPES) == {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"}


@each_isa
@each_type
def test_decoding_is_exact(tensor_type: str, isa: str) -> None:
    rng = np.random.default_rng(0)
    stored, decoded = quantized(tensor_type, rng.standard_normal((7, 96)).astype(np.float32))
    ours = _core.dequantize(tensor_type, stored, decoded.size, isa)
    np.testing.assert_array_equal(ours.reshape(decoded.shape), decoded)


@each_isa
@pytest.mark.parametrize("tensor_type", INT8_TYPES)
def test_decoding_any_bytes(tensor_type: str, isa: str) -> None:
    """Codes that our quantizers do not write, -128 among them, and subnormal scales."""
    quantization = gguf.GGMLQuantizationType[tensor_type]
    size = gguf.GGML_QUANT_SIZES[quantization][1]
    stored = np.random.default_rng(1).integers(0, 256, (40, size)).astype(np.uint8)
    stored[:, 1] &= 0x3F
    stored[:8, 1] = 0
    if tensor_type == "Q4_1":
        stored[:, 3] &= 0x3F
    decoded = gguf.quants.dequantize(stored, quantization)
    np.testing.assert_array_equal(
        _core.dequantize(tensor_type, stored.reshape(-1), decoded.size, isa), decoded.reshape(-1)
    )


@each_isa
@each_type
@pytest.mark.parametrize(("n_rows", "k", "n_tokens"), [(1, 32, 1), (9, 96, 1), (11, 160, 6), (8, 512, 13)])
def test_matmul(tensor_type: str, isa: str, n_rows: int, k: int, n_tokens: int) -> None:
    rng = np.random.default_rng(n_rows)
    w = rng.standard_normal((n_rows, k)).astype(np.float32)
    x = rng.standard_normal((n_tokens, k)).astype(np.float32)
    stored, decoded = quantized(tensor_type, w)
    seen = activations_as_int8(x) if tensor_type in INT8_TYPES else x
    expected = seen.astype(np.float64) @ decoded.astype(np.float64).T
    y = _core.matmul(tensor_type, stored, n_rows, x, isa)
    np.testing.assert_allclose(y, expected, atol=2e-6 * k**0.5 * 4, rtol=1e-5)


@pytest.mark.parametrize(("isa", "tensor_type"), PACKED)
@pytest.mark.parametrize(
    ("n_rows", "k", "n_tokens"), [(1, 32, 1), (8, 96, 3), (17, 160, 7), (40, 64, 1), (48, 512, 25)]
)
def test_packed_rows(tensor_type: str, isa: str, n_rows: int, k: int, n_tokens: int) -> None:
    """The same as from stored rows but for the order of the sum, and the same for any number of tokens."""
    rng = np.random.default_rng(n_rows)
    stored, _ = quantized(tensor_type, rng.standard_normal((n_rows, k)).astype(np.float32))
    x = rng.standard_normal((n_tokens, k)).astype(np.float32)
    y = _core.matmul(tensor_type, stored, n_rows, x, isa, packed=True)
    expected = _core.matmul(tensor_type, stored, n_rows, x, "scalar")
    np.testing.assert_allclose(y, expected, atol=2e-6 * k**0.5 * 4, rtol=1e-5)
    for t in range(n_tokens):
        alone = _core.matmul(tensor_type, stored, n_rows, x[t : t + 1], isa, packed=True)
        np.testing.assert_array_equal(alone[0], y[t])


@pytest.mark.parametrize(
    ("isa", "tensor_type", "packed"),
    [(isa, t, False) for isa in ISAS for t in INT8_TYPES] + [(isa, t, True) for isa, t in PACKED],
)
def test_matmul_with_the_largest_codes(tensor_type: str, isa: str, packed: bool) -> None:
    """Sums of products must not saturate."""
    n_blocks = 4
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    for code in (0x80, 0x7F, 0xFF, 0x00):
        body = {"Q8_0": 32, "Q4_0": 16, "Q4_1": 16}[tensor_type]
        head = [scale, scale] if tensor_type == "Q4_1" else [scale]
        block = np.concatenate([*head, np.full(body, code, np.uint8)])
        stored = np.tile(block, n_blocks)
        decoded = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[tensor_type]).reshape(-1)
        for sign in (1.0, -1.0):
            x = np.full((1, 32 * n_blocks), sign, np.float32)
            y = _core.matmul(tensor_type, stored, 1, x, isa, packed=packed)
            np.testing.assert_allclose(y[0, 0], sign * decoded.astype(np.float64).sum(), rtol=1e-5)


@each_isa
@pytest.mark.parametrize("k", [5, 8, 19])
@pytest.mark.parametrize("tensor_type", ["F32", "F16", "BF16"])
def test_rows_of_any_length(tensor_type: str, k: int, isa: str) -> None:
    rng = np.random.default_rng(k)
    stored, decoded = quantized(tensor_type, rng.standard_normal((3, k)).astype(np.float32))
    x = rng.standard_normal((2, k)).astype(np.float32)
    np.testing.assert_allclose(_core.matmul(tensor_type, stored, 3, x, isa), x @ decoded.T, atol=1e-5)
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
        _core.dequantize("Q4_K", data, 256)
    with pytest.raises(QwenQuantError, match="scalar has no packed Q4_0"):
        _core.matmul("Q4_0", data, 1, np.zeros((1, 32), np.float32), "scalar", packed=True)
    with pytest.raises(QwenQuantError, match="unknown tensor type"):
        _core.dequantize("Q9", data, 32)
    with pytest.raises(QwenQuantError, match="cannot run on this CPU"):
        _core.dequantize("Q4_0", data, 32, "sse")
