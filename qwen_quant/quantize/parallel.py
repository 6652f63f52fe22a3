"""Independent torch work on several threads, each of which computes alone.

Small matrices gain little from being cut among threads, and wait for the slowest one in each operation; problems of
their own do not wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class OnEach(Protocol):
    """`each_on_its_thread`, or the same with more than the threads of this process."""

    def __call__(self, function: Callable[[Item], Result], items: Sequence[Item], /) -> list[Result]: ...


def each_on_its_thread(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`function` of each item, in order; as many at once as torch has threads. The first exception is raised."""
    threads = torch.get_num_threads()
    if threads == 1 or len(items) == 1:
        return [function(item) for item in items]
    # The setting is both the process's and the calling thread's: workers start with the machine's default.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)
