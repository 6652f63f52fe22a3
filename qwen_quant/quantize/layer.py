"""What the quantizer hands to exporters: a decoder layer's quantized weights and how they came out."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_quant.grids.base import QuantizedTensor


@dataclass(frozen=True)
class LinearReport:
    """How one linear layer came out; errors are relative output errors, `fallback` names a failed solve."""

    name: str
    grid: str
    error: float
    rtn_error: float
    damping: float
    tokens: int
    fallback: str = ""


@dataclass
class QuantizedLayer:
    """The quantized weights of one decoder layer by tensor name (NumPy), and their reports."""

    layer: int
    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    reports: list[LinearReport] = field(default_factory=list)
    seconds: float = 0.0
