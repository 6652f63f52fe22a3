"""Hessians of linear layers, accumulated over calibration activations."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qwen_quant.errors import CalibrationError
from qwen_quant.quantize.parallel import each_on_few_threads
from qwen_quant.quantize.ranks import each_on_its_rank, own_part

LARGEST = 1e17  # activation whose square can be summed over thousands of tokens
BLOCK = 256  # rows of a matrix of moments that are summed at once


@contextlib.contextmanager
def fast_matmul() -> Iterator[None]:
    """Let FP32 matrix products round their inputs to BF16 (sums stay FP32) where the CPU has BF16 units.

    The models' weights are BF16 anyway, and a Hessian's entries are means over thousands of tokens: rounding
    2^-9 of each factor is far below the sampling error. Elsewhere the setting changes nothing.
    """
    with _products_in("bf16"):
        yield


@contextlib.contextmanager
def _products_in(precision: str) -> Iterator[None]:
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before


class Calibration:
    """The moments of one shared input: `hessian` [K, K] = mean over tokens of x xᵀ, and `lack` [M, K], the mean of y xᵀ
    over those with which a y [M] came. FP32.

    The mean is kept rather than the sum: for the widest input it is the largest tensor of a run, once is enough.
    With `shared` all ranks see all inputs, and each of them sums some of the rows.
    """

    def __init__(self, k: int, where: str, device: torch.device | str = "cpu", shared: bool = False) -> None:
        self.where = where
        self.n_tokens = 0
        self._shared = shared
        self._mean = torch.zeros(k, k, dtype=torch.float32, device=device)
        self._lack: Tensor | None = None
        self._n_lacking = 0  # tokens that count in it
        self._complete = True  # whether all rows are there, and what lies above the blocks on the diagonal

    def add(self, x: Tensor, lack: Tensor | None = None) -> None:
        """Count inputs x [..., K], and `lack` [..., M] of the first of them, where it is known.

        Raises CalibrationError when inputs are not finite, or their squares would not be.
        """
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
        shares = _shares(self.n_tokens, len(x))
        self.n_tokens += len(x)

        def summed(rows: slice) -> None:  # the lower triangle is half the work
            self._mean[rows, : rows.stop].addmm_(x[:, rows].T, x[:, : rows.stop], **shares)

        each_on_few_threads(summed, self._own(self._mean)[::-1])  # those with most work first
        if lack is not None:
            lack = lack.reshape(-1, lack.shape[-1])
            self._add_lack(x[: len(lack)], lack)
        self._complete = False

    def _add_lack(self, x: Tensor, lack: Tensor) -> None:
        if self._lack is None:
            self._lack = torch.zeros(lack.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
        shares = _shares(self._n_lacking, len(x))
        self._n_lacking += len(x)
        mean = self._lack

        def summed(rows: slice) -> None:
            mean[rows].addmm_(lack[:, rows].T, x, **shares)

        each_on_few_threads(summed, self._own(mean))

    def less(self, weight: Tensor) -> None:
        """Take off `lack` what `weight` [M, K] makes of the inputs: E[y xᵀ] - W E[x xᵀ] is E[(y - W x) xᵀ].

        All that have come so far must have had a y.
        """
        if self._lack is None:
            return
        self._finish()
        with _products_in("ieee"):  # a small difference of large numbers
            for rows in self._own(self._lack):
                self._lack[rows].addmm_(weight[rows], self._mean, alpha=-1)
        self._complete = not self._shared

    @property
    def hessian(self) -> Tensor:
        """The whole matrix [K, K]."""
        self._finish()
        return self._mean

    @property
    def lack(self) -> Tensor | None:
        """The whole matrix [M, K], if there is one."""
        self._finish()
        return self._lack

    def _own(self, matrix: Tensor) -> Sequence[slice]:
        """The rows of a matrix that this rank sums."""
        return own_part(_blocks(matrix)) if self._shared else _blocks(matrix)

    def _finish(self) -> None:
        """Put in place what other ranks have summed, and what lies above the diagonal."""
        if self._complete:
            return
        if self._shared:
            _collect(self._mean, triangle=True)
            if self._lack is not None:
                _collect(self._lack, triangle=False)
        for rows in _blocks(self._mean):
            self._mean[rows, rows.stop :] = self._mean[rows.stop :, rows].T
        self._complete = True


def _shares(before: int, more: int) -> dict[str, float]:
    """What a mean over `before` tokens and a sum over some `more` count for in the mean over all."""
    return {"beta": before / (before + more), "alpha": 1 / (before + more)}


def _blocks(matrix: Tensor) -> list[slice]:
    """The rows of a matrix, some at a time."""
    return [slice(start, min(start + BLOCK, len(matrix))) for start in range(0, len(matrix), BLOCK)]


def _collect(matrix: Tensor, triangle: bool) -> None:
    """Give every rank the rows that others have summed, the `triangle` below the diagonal or all of each."""

    def summed(rows: slice) -> Tensor:
        return matrix[rows, : rows.stop if triangle else None]

    blocks = _blocks(matrix)
    for rows, part in zip(blocks, each_on_its_rank(summed, blocks), strict=True):
        matrix[rows, : rows.stop if triangle else None] = part
