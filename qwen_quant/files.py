"""Writing outputs so that a reader never sees half of one: write beside, fsync, rename."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from qwen_quant.errors import OutputError


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _reporting(target: Path, option: str = "-o") -> Iterator[None]:
    """Turn the operating system's refusals into one line that names the output."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"{target}: cannot be written ({reason}); choose another place with {option}"
        ) from None


def _beside(target: Path) -> Path:
    """The name under which an output is written; "." and ".." are resolved, for they have no beside."""
    place = Path(os.path.abspath(target))
    return place.with_name(f".{place.name}.{os.getpid()}.partial")


def _clear_stale(partial: Path) -> None:
    """Remove what killed processes left of earlier attempts at the same output."""
    name, pid = partial.name.removesuffix(".partial").rsplit(".", 1)
    for path in partial.parent.glob(f"{glob.escape(name)}.*.partial"):
        other = path.name.removesuffix(".partial").rsplit(".", 1)[1]
        if other.isdigit() and other != pid and not _alive(int(other)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def atomic_file(target: Path, option: str = "-o") -> Iterator[Path]:
    """Yield a path beside `target`; on success it is synced and renamed to `target`, otherwise removed.

    Raises OutputError naming the `option` with which another place is chosen.
    """
    target = Path(target)
    with _reporting(target, option):
        if target.is_dir():
            raise OutputError(f"{target}: is a folder; name a file with {option}")
        partial = _beside(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(partial)
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

    Raises OutputError when `target` cannot be written or already holds files: `overwrite` replaces
    checkpoints (folders with config.json), nothing else.
    """
    target = Path(target)
    with _reporting(target):
        if target.exists() and not target.is_dir():
            raise OutputError(f"{target}: is a file; name a folder with -o")
        if target.is_dir() and any(target.iterdir()):
            if not overwrite:
                raise OutputError(f"{target}: is not empty; choose another -o or pass --overwrite")
            if not (target / "config.json").is_file():
                raise OutputError(f"{target}: is not empty and no checkpoint; remove it or choose another -o")
        partial = _beside(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(partial)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for path in partial.rglob("*"):
                _fsync(path)
            place = Path(os.path.abspath(target))
            if place.is_dir():
                shutil.rmtree(place)
            os.replace(partial, place)
            _fsync(place.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


# What stands beside the weights of a checkpoint and belongs to whatever is made of it.
SIDE_FILES = ("*.json", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*")


def copy_side_files(source: Path, target: Path, patterns: Iterable[str], leave_out: Container[str]) -> None:
    """Copy the files directly in `source` that match `patterns`, but for the names to leave out."""
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file() and path.name not in leave_out:
                shutil.copyfile(path, target / path.name)
