"""What a stage of a layer reads, for its Hessian and for its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from qwen_quant.quantize import scratch
from qwen_quant.quantize.ranks import each_on_its_rank

TOKENS_AT_ONCE = 1024  # calibration tokens per forward pass: bounds activations beside the hidden states
ROUTED_AT_ONCE = 4096  # where each token goes to a few of many experts


def _windows_at_once(seq_len: int, routed: bool = False) -> int:
    return max(1, (ROUTED_AT_ONCE if routed else TOKENS_AT_ONCE) // seq_len)


def batches_of(hidden: Tensor, routed: bool = False) -> tuple[Tensor, ...]:
    """Views of `hidden` [samples, seq, hidden] for one forward pass each, through experts if `routed`; writing to one
    writes to `hidden`."""
    return hidden.split(_windows_at_once(hidden.shape[1], routed))


# Of a batch's number and what it makes a stage's linears read: for its first windows, or None where it is not known.
OfBatch = Callable[[int, Tensor], Tensor | None]


class Inputs:
    """What a stage's linears read, batch by batch: first for their moments, then, solved, for their outputs.

    Kept in between, where the batches lie (scratch.py), or computed a second time. Each batch belongs to one rank, the
    same in all stages. With `lack`, inputs come with what it says they lack (targets.py).
    """

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        batches: tuple[Tensor, ...],
        keep: bool = False,
        lack: OfBatch | None = None,
    ) -> None:
        self._compute, self._batches, self._keep, self._lack = compute, batches, keep, lack
        self._kept: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        return each_on_its_rank(self._first, range(len(self._batches)))

    def _first(self, number: int) -> tuple[Tensor, Tensor | None]:
        x = self._compute(self._batches[number])
        if self._keep:
            self._kept[number] = scratch.beside(self._batches[number], x)
        lack = None if self._lack is None else self._lack(number, x)
        scratch.let_go(number)
        return x, lack

    def outputs(self, function: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """What `function` makes of each batch; what was kept is let go."""

        def output(number: int) -> Tensor:
            kept = self._kept.pop(number, None)
            made = function(self._compute(self._batches[number]) if kept is None else kept)
            scratch.let_go(number)
            return made

        return each_on_its_rank(output, range(len(self._batches)))
