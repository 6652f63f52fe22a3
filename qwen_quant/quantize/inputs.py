"""What a stage of a layer reads, for its Hessian and for its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor


class Inputs:
    """What a stage's linears read, batch by batch: first for their Hessian, then, solved, for their outputs.

    Kept in between, or computed a second time.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor], batches: tuple[Tensor, ...], keep: bool) -> None:
        self._compute, self._batches, self._keep = compute, batches, keep
        self._kept: list[Tensor] = []

    def __iter__(self) -> Iterator[Tensor]:
        if self._kept:
            while self._kept:
                yield self._kept.pop(0)
            return
        for part in self._batches:
            x = self._compute(part)
            if self._keep:
                self._kept.append(x)
            yield x
