"""What a stage of a layer reads, for its Hessian and for its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from qwen_quant.quantize import scratch
from qwen_quant.quantize.parallel import each_on_few_threads, few_threads
from qwen_quant.quantize.ranks import each_on_its_rank

Result = TypeVar("Result")
TOKENS_AT_ONCE = 512  # calibration tokens per forward pass: bounds activations beside the hidden states
ROUTED_AT_ONCE = 4096  # where each token goes to a few of many experts
LARGEST = 126  # exponent of a unit, so that it and its inverse are normal numbers


def _windows_at_once(seq_len: int, routed: bool = False) -> int:
    return max(1, (ROUTED_AT_ONCE if routed else TOKENS_AT_ONCE) // seq_len)


def batches_of(hidden: Tensor, routed: bool = False) -> tuple[Tensor, ...]:
    """Views of `hidden` [samples, seq, hidden] for one forward pass each, through experts if `routed`; writing to one
    writes to `hidden`."""
    return hidden.split(_windows_at_once(hidden.shape[1], routed))


def batches_at_once() -> int:
    """A batch for each thread, if these are few: more would take much memory."""
    return torch.get_num_threads() if few_threads() else 1


# Of a batch's number and what it makes a stage's linears read: for its first windows, or None where it is not known.
OfBatch = Callable[[int, Tensor], Tensor | None]


def each_batch(function: Callable[[int], Result], numbers: range) -> Iterator[Result]:
    """`each_on_its_rank` of the batches of these numbers, `batches_at_once` of them on threads of their own."""
    count = batches_at_once()
    some = [numbers[start : start + count] for start in range(0, len(numbers), count)]
    return chain.from_iterable(each_on_its_rank(lambda each: each_on_few_threads(function, each), some))


@dataclass
class Narrow:
    """Values [..., K] in half the memory: FP16, each row in the units of a power of two that bring it below 1.

    What is lost of a value is a 2048th at most, or of the row's largest one 2^-25.
    """

    values: Tensor
    unit: Tensor  # [..., 1]

    @classmethod
    def of(cls, x: Tensor) -> Narrow:
        largest = x.abs().amax(-1, keepdim=True)  # vector_norm takes ten times as long
        exponent = largest.frexp().exponent.clamp(-LARGEST, LARGEST)
        one = torch.ones_like(largest)
        return cls((x * torch.ldexp(one, -exponent)).half(), torch.ldexp(one, exponent))

    def beside(self, hidden: Tensor) -> Narrow:
        """The same, where `hidden` lies (scratch.py)."""
        return Narrow(scratch.beside(hidden, self.values), self.unit)

    def wide(self) -> Tensor:
        return self.values.float().mul_(self.unit)


class Inputs:
    """What a stage's linears read, batch by batch: first for their moments, then, solved, for their outputs.

    Kept in between, where the batches lie (scratch.py), or computed a second time; outputs see them `narrow` in both
    cases, unless that is not wanted. Each batch belongs to one rank. With `lack`, inputs come with what it says they
    lack (targets.py): those of the first `lacking` batches, which are in one row with the others or come by themselves.
    """

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        batches: tuple[Tensor, ...],
        keep: bool = False,
        lack: OfBatch | None = None,
        narrow: bool = True,
        lacking: int = 0,
    ) -> None:
        self._compute, self._batches, self._keep, self._lack = compute, batches, keep, lack
        self._narrow = narrow
        self._runs = range(lacking), range(lacking, len(batches))
        self._kept: dict[int, Narrow] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        return chain(self.lacking(), self.others())

    def lacking(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The first of them."""
        return self._read(self._runs[0])

    def others(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Those after them."""
        return self._read(self._runs[1])

    def _read(self, run: range) -> Iterator[tuple[Tensor, Tensor | None]]:
        for number, found in zip(run, each_batch(self._first, run), strict=True):
            yield found
            scratch.let_go(number)  # here, where no thread is at work in those pages

    def _first(self, number: int) -> tuple[Tensor, Tensor | None]:
        scratch.fetch(self._batches[number])
        x = self._compute(self._batches[number])
        if self._keep:
            self._kept[number] = Narrow.of(x).beside(self._batches[number])
        return x, None if self._lack is None else self._lack(number, x)

    def outputs(self, function: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """What `function` makes of each batch; what was kept is let go."""

        def output(number: int) -> Tensor:
            scratch.fetch(self._batches[number], to_write=True)
            if not self._narrow:
                return function(self._compute(self._batches[number]))
            kept = self._kept.pop(number, None)
            return function((kept or Narrow.of(self._compute(self._batches[number]))).wide())

        return chain.from_iterable(each_batch(output, run) for run in self._runs)
