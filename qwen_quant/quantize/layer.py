"""What the quantizer hands to exporters: a decoder layer's quantized weights and how they came out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qwen_quant.grids.base import QuantizedTensor, Scales
from qwen_quant.quantize.gptq import Solution


@dataclass(frozen=True)
class LinearReport:
    """How one linear layer came out; errors are relative output errors, `fallback` names a failed solve, `note` what
    else is worth saying of it.

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
    note: str = ""

    @classmethod
    def of(cls, name: str, solution: Solution, tokens: int, pooled: float = 0.0) -> LinearReport:
        """The report of a solved weight."""
        inputs = solution.tensor.codes.shape[1]
        notes = [f"damping had to grow to {solution.damping:g}"] if solution.more_damping else []
        if tokens < inputs and not pooled:
            notes.append(f"rank-deficient, {tokens} tokens for {inputs} inputs: more --num-samples help")
        return cls(
            name,
            solution.tensor.grid.name,
            solution.error,
            solution.rtn_error,
            solution.damping,
            tokens,
            solution.fallback,
            pooled,
            "; ".join(notes),
        )


class Stopwatch:
    """Where time goes: `lap(part)` adds the seconds since the last lap to `seconds[part]`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, part: str) -> None:
        now = time.monotonic()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


@dataclass
class QuantizedLayer:
    """The quantized weights of one decoder layer by tensor name (NumPy), and their reports; `layer` is -1 for those
    outside the layers.

    `parts` says how the `seconds` divide into reading, forward passes, Hessians and solving.
    """

    layer: int
    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    reports: list[LinearReport] = field(default_factory=list)
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)


def to_numpy(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same tensor with NumPy arrays of its own (stacked solves hand out views)."""

    def own(x: Tensor) -> np.ndarray:
        return x.cpu().numpy().copy()

    index = None if tensor.group_index is None else own(tensor.group_index)
    return QuantizedTensor(
        tensor.grid, own(tensor.codes), Scales(own(tensor.scales.scale), own(tensor.scales.offset)), index
    )


def to_torch(tensor: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    """The inverse of `to_numpy`, on `device`."""

    def move(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(device)

    index = None if tensor.group_index is None else move(tensor.group_index)
    return QuantizedTensor(
        tensor.grid, move(tensor.codes), Scales(move(tensor.scales.scale), move(tensor.scales.offset)), index
    )
