"""Functions of llama.cpp's tensor library, from xllamacpp's shared library."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest


def quantize_chunk(name: str, w: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Weights [N, K] as ggml_quantize_chunk stores them for `importance` [K]: bytes [N, bytes per row].

    Skips the test where xllamacpp is not installed or does not let its functions be called.
    """
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        pytest.skip("xllamacpp (llama.cpp) is not installed")
    libraries = sorted(Path(found.origin).parent.glob("xllamacpp*.so"))
    function = getattr(ctypes.CDLL(str(libraries[0])), "ggml_quantize_chunk", None) if libraries else None
    if function is None:
        pytest.skip("this xllamacpp does not export ggml_quantize_chunk")
    function.restype = ctypes.c_size_t
    function.argtypes = (
        [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    )
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    w, importance = (np.ascontiguousarray(x, dtype=np.float32) for x in (w, importance))
    n, k = w.shape
    stored = np.empty((n, k // block * size), dtype=np.uint8)
    written = function(int(kind), w.ctypes.data, stored.ctypes.data, 0, n, k, importance.ctypes.data)
    assert written == stored.size
    return stored
