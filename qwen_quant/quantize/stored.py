"""What exporters tell the planner: each tensor of an output, how it is stored and in how many bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen_quant.spec import TensorInfo


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the output: `kind` is a grid's name or a float type, `count` how many alike (experts) it stands
    for; `nbytes` of all of them together."""

    info: TensorInfo
    kind: str
    nbytes: int
    quantized: bool
    count: int = 1

    @property
    def weights(self) -> int:
        return self.count * math.prod(self.info.shape)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights
