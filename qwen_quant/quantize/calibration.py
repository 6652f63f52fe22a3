"""Hessians of linear layers, accumulated over calibration activations."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qwen_quant.errors import CalibrationError
from qwen_quant.quantize.ranks import each_on_its_rank, own_part

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
    With `shared` all ranks see all inputs, and each of them sums some of the rows.
    """

    def __init__(self, k: int, where: str, device: torch.device | str = "cpu", shared: bool = False) -> None:
        self.where = where
        self.n_tokens = 0
        self._shared = shared
        self._blocks = [slice(start, min(start + BLOCK, k)) for start in range(0, k, BLOCK)]
        self._mean = torch.zeros(k, k, dtype=torch.float32, device=device)
        self._complete = True  # whether all rows are there, and what lies above the blocks on the diagonal

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
        # The lower triangle is half the work.
        for rows in own_part(self._blocks) if self._shared else self._blocks:
            self._mean[rows, : rows.stop].addmm_(
                x[:, rows].T, x[:, : rows.stop], beta=before / self.n_tokens, alpha=1 / self.n_tokens
            )
        self._complete = False

    @property
    def hessian(self) -> Tensor:
        """The whole matrix [K, K]."""
        if not self._complete:
            if self._shared:
                self._collect()
            for rows in self._blocks:
                self._mean[rows, rows.stop :] = self._mean[rows.stop :, rows].T
            self._complete = True
        return self._mean

    def _collect(self) -> None:
        """Put in place what other ranks have summed."""
        found = each_on_its_rank(lambda rows: self._mean[rows, : rows.stop], self._blocks)
        for rows, part in zip(self._blocks, found, strict=True):
            self._mean[rows, : rows.stop] = part
