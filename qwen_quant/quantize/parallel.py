"""Independent torch work on several threads, each of which computes alone.

Small matrices gain little from being cut among threads, and wait for the slowest one in each operation; problems of
their own do not wait for each other.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

FEW = 4  # threads
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
    gradients = torch.is_grad_enabled()  # each thread has a setting of its own

    def called(item: Item) -> Result:
        with torch.set_grad_enabled(gradients):
            return function(item)

    torch.set_num_threads(1)  # both the process's setting and the calling thread's
    try:
        return list(_pool(threads).map(called, items))
    finally:
        torch.set_num_threads(threads)


def few_threads() -> bool:
    """Whether large operations are better given to a thread each than cut among all threads."""
    return torch.get_num_threads() <= FEW


def each_on_few_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`each_on_its_thread` where these are few; otherwise one item after the other, on all of them."""
    return each_on_its_thread(function, items) if few_threads() else [function(item) for item in items]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay: each new one would get memory of its own for matrix products."""
    # They start with the machine's default, and with what they set here the whole process's changes: all do so at once.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    all_here = threading.Barrier(threads)
    list(pool.map(lambda _: all_here.wait(), range(threads)))
    return pool
