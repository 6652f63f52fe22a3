"""Progress of long work: a bar with an ETA on a terminal, nothing when standard error is piped."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


def _silent(amount: float, note: str) -> None:
    """Advance nothing."""


@contextlib.contextmanager
def progress(description: str, total: float) -> Iterator[Callable[[float, str], None]]:
    """Yield `advance(amount, note)`; the bar shows `description`, the last note, and the time left."""
    if not sys.stderr.isatty():
        yield _silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(amount: float, note: str = "") -> None:
            bar.update(task, advance=amount, note=note)

        yield advance
