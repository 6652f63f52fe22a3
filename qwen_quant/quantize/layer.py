"""What the quantizer hands to exporters: a decoder layer's quantized weights and how they came out."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_quant.grids.base import QuantizedTensor


@dataclass(frozen=True)
class LinearReport:
    """How one linear layer came out; errors are relative output errors, `fallback` names a failed solve.

    `pooled` is the layer's share in the Hessian of an expert that saw few tokens (a cold one), else 0.
    """

    name: str
    grid: str
    error: float
    rtn_error: float
    damping: float
    tokens: int
    fallback: str = ""
    pooled: float = 0.0


@dataclass
class QuantizedLayer:
    """The quantized weights of one decoder layer by tensor name (NumPy), and their reports."""

    layer: int
    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    reports: list[LinearReport] = field(default_factory=list)
    seconds: float = 0.0
