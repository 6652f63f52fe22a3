"""What instruction sets do to the numbers they multiply."""

from __future__ import annotations

import numpy as np


def rounds_to_bf16(tensor_type: str, isa: str) -> bool:
    """Whether activations become BF16 before they are multiplied."""
    return tensor_type == "BF16" and isa == "avx512bf16"


def is_exact(tensor_type: str, isa: str) -> bool:
    """Whether activations are multiplied as floats."""
    return tensor_type in ("F32", "F16", "BF16") and not rounds_to_bf16(tensor_type, isa)


def as_bf16(x: np.ndarray) -> np.ndarray:
    """x rounded to BF16, to even between two of them."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).reshape(x.shape)
