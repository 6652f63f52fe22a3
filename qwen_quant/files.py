"""Writing outputs so that a reader never sees half of one: write beside, fsync, rename."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qwen_quant.errors import OutputError


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _reporting(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line that names the output."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{target}: cannot be written ({reason}); choose another place with -o") from None


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`; on success it is synced and renamed to `target`, otherwise removed."""
    target = Path(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with _reporting(target):
        if target.is_dir():
            raise OutputError(f"{target}: is a folder; name a file with -o")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _fsync(partial)
            os.replace(partial, target)
            _fsync(target.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `target`; on success its files are synced and it takes `target`'s name.

    Raises OutputError when `target` already holds files (unless `overwrite`) or cannot be written.
    """
    target = Path(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with _reporting(target):
        if target.exists() and not target.is_dir():
            raise OutputError(f"{target}: is a file; name a folder with -o")
        if target.is_dir() and any(target.iterdir()) and not overwrite:
            raise OutputError(f"{target}: is not empty; remove it, choose another -o, or pass --overwrite")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for path in partial.rglob("*"):
                _fsync(path)
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(partial, target)
            _fsync(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
