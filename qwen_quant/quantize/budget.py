"""Spending a budget of bytes where it saves the most loss: one option for each tensor.

With losses that add up, the best plans are those that minimise loss + λ bytes for some λ (Everett 1963): every tensor
then stands on the lower convex hull of its own options. The plan walks along these hulls by falling gain for each
byte, and what is left of the budget goes to single steps that still fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen_quant.errors import UsageError


@dataclass(frozen=True)
class Option:
    """A way to store a tensor: the name of a type, its bytes, and the loss in nats."""

    type: str
    nbytes: int
    loss: float


def spend(menus: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """The option of each tensor, all within `budget` bytes and with the least loss.

    The same menus give the same plan. Raises UsageError when even the smallest options are too large.
    """
    hulls = {name: _hull(options) for name, options in sorted(menus.items())}
    place = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].nbytes for hull in hulls.values())
    if left < 0:
        raise UsageError(
            f"the budget is {-left / 1e6:.2f} MB too small for the smallest types of all tensors; raise "
            "--target-bpw or --target-size"
        )
    steps = sorted(
        (-_gain(before, after), name, index)
        for name, hull in hulls.items()
        for index, (before, after) in enumerate(itertools.pairwise(hull))
    )
    # Gains fall along a hull, so a tensor's steps come in order; one that does not fit ends its tensor's.
    for _, name, index in steps:
        cost = hulls[name][index + 1].nbytes - hulls[name][index].nbytes
        if place[name] == index and cost <= left:
            place[name] += 1
            left -= cost
    chosen = {name: hull[place[name]] for name, hull in hulls.items()}
    return _filled(menus, chosen, left)


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull of losses over bytes, bytes ascending."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.loss, o.type)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-1], option) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        if hull and hull[-1].nbytes == option.nbytes:
            hull.pop()
        hull.append(option)
    return hull


def _gain(before: Option, after: Option) -> float:
    """Loss saved for each byte more."""
    return (before.loss - after.loss) / max(1, after.nbytes - before.nbytes)


def _filled(menus: Mapping[str, Sequence[Option]], chosen: dict[str, Option], left: int) -> dict[str, Option]:
    """`chosen` with single changes, the best first, that fit in what is `left`."""
    while True:
        changes = [
            (option.loss - chosen[name].loss, name, option)
            for name, options in sorted(menus.items())
            for option in options
            if option.nbytes - chosen[name].nbytes <= left and option.loss < chosen[name].loss
        ]
        if not changes:
            return chosen
        _, name, option = min(changes, key=lambda change: (change[0], change[1], change[2].type))
        left -= option.nbytes - chosen[name].nbytes
        chosen[name] = option
