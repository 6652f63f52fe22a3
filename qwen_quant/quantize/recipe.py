"""Recipe: everything that decides the result of a quantization run, in one hashable record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from qwen_quant import __version__
from qwen_quant.errors import UsageError
from qwen_quant.grids.base import AffineGrid
from qwen_quant.spec import TensorInfo

GridChoice = Callable[[TensorInfo], AffineGrid | None]  # None leaves the tensor in full precision


@dataclass(frozen=True)
class Recipe:
    """How to calibrate and solve. `calibrate=False` is plain rounding on the same grids; `correct_targets` aims at
    the outputs in full precision (targets.py), `output_aware` weighs errors by what they do to the predictions
    (row_moments.py)."""

    calibrate: bool = True
    dataset: str = "builtin"
    num_samples: int = 128
    seq_len: int = 512
    seed: int = 0
    damp_percent: float = 0.01
    desc_act: bool = False
    correct_targets: bool = True
    output_aware: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 0 < self.damp_percent < 1:
            raise UsageError(f"--damp-percent {self.damp_percent}: must lie between 0 and 1, 0.01 is usual")
        if self.num_samples < 1 or self.seq_len < 2:
            raise UsageError("--num-samples must be at least 1 and --seq-len at least 2")
        if self.desc_act and not self.calibrate:
            raise UsageError("--desc-act orders columns by calibration; drop it or --no-calibration")
        if self.output_aware and not self.calibrate:
            raise UsageError("--output-aware needs calibration; drop it or --no-calibration")

    def record(self, data_hash: str = "") -> dict[str, Any]:
        """What is written into the artifact: the recipe, the hash of the calibration windows, our version."""
        fields = asdict(self) | {"version": __version__, "data_sha256": data_hash}
        if not self.calibrate:
            fields = {"calibrate": False, "version": __version__}
        return fields


def linear_grid(grid: AffineGrid) -> GridChoice:
    """Every linear layer of the decoder on one grid, all else in full precision."""
    return lambda info: grid if info.role == "linear" else None
