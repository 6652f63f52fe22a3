"""Hessians of linear layers, accumulated over calibration activations."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qwen_quant.errors import CalibrationError

LARGEST = 1e17  # activation whose square can be summed over thousands of tokens
BLOCK = 256  # rows of a Hessian that are summed at once


@contextlib.contextmanager
def fast_matmul() -> Iterator[None]:
    """Let FP32 matrix products round their inputs to BF16 (sums stay FP32) where the CPU has BF16 units.

    The models' weights are BF16 anyway, and a Hessian's entries are means over thousands of tokens: rounding
    2^-9 of each factor is far below the sampling error. Elsewhere the setting changes nothing.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class Calibration:
    """The second moments of one shared input: `hessian` [K, K] = mean over tokens of x xᵀ, FP32.

    The mean is kept rather than the sum: for the widest input it is the largest tensor of a run, once is enough.
    """

    def __init__(self, k: int, where: str, device: torch.device | str = "cpu") -> None:
        self.where = where
        self.n_tokens = 0
        self._mean = torch.zeros(k, k, dtype=torch.float32, device=device)
        self._mirrored = True  # whether what lies above the blocks on the diagonal is up to date

    def add(self, x: Tensor) -> None:
        """Count inputs x [..., K]. Raises CalibrationError when they are not finite, or their squares would not be."""
        x = x.reshape(-1, x.shape[-1])
        # One non-finite input makes its diagonal non-finite, so checking the mean later would find it too, but
        # checking here names the layer while the run is young.
        largest = float(torch.stack(x.aminmax()).abs().max()) if len(x) else 0.0  # NaN when there is one
        if not largest < LARGEST:
            what = (
                f"reach {largest:.1e}, too much to be squared" if math.isfinite(largest) else "are not finite"
            )
            raise CalibrationError(
                f"{self.where}: activations {what}; the checkpoint is broken, or its config.json is of another model"
            )
        if not len(x):
            return
        before, self.n_tokens = self.n_tokens, self.n_tokens + len(x)
        for rows in self._blocks():  # the lower triangle is half the work
            self._mean[rows, : rows.stop].addmm_(
                x[:, rows].T, x[:, : rows.stop], beta=before / self.n_tokens, alpha=1 / self.n_tokens
            )
        self._mirrored = False

    @property
    def hessian(self) -> Tensor:
        """The whole matrix [K, K]."""
        if not self._mirrored:
            for rows in self._blocks():
                self._mean[rows, rows.stop :] = self._mean[rows.stop :, rows].T
            self._mirrored = True
        return self._mean

    def _blocks(self) -> Iterator[slice]:
        k = len(self._mean)
        return (slice(start, min(start + BLOCK, k)) for start in range(0, k, BLOCK))
