"""Reading GGUF files with the gguf library."""

from __future__ import annotations

import gguf
import numpy as np
from gguf.quants import dequantize


def decoded(reader: gguf.GGUFReader, name: str) -> np.ndarray:
    """A tensor as float32 in its own shape, decoded by the gguf library."""
    tensor = next(t for t in reader.tensors if t.name == name)
    kind = gguf.GGMLQuantizationType(tensor.tensor_type)
    shape = tuple(int(n) for n in tensor.shape[::-1])
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return np.asarray(tensor.data, dtype=np.float32).reshape(shape)
    return dequantize(tensor.data, kind).astype(np.float32).reshape(shape)


def type_of(reader: gguf.GGUFReader, name: str) -> str:
    return next(t for t in reader.tensors if t.name == name).tensor_type.name
