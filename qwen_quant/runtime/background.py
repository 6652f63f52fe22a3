"""Something computed in a thread of its own while the caller goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """The result of `compute`, which begins at once.

    Worth a thread only beside work that leaves Python's lock alone, as packing weights does.
    """

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute
        self._outcome: T | BaseException | None = None
        self._failed = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = self._compute()
        except BaseException as error:
            self._outcome = error
            self._failed = True

    def result(self) -> T:
        """Waits for it. Raises what `compute` raised."""
        self._thread.join()
        if self._failed:
            raise self._outcome  # type: ignore[misc]
        return self._outcome  # type: ignore[return-value]
