"""Activations in files: the system keeps their pages in what memory is free, and writes them out where there is none.

The hidden states of all calibration windows, and what attention and SwiGLU made of them, are the one part of a run
that grows with its calibration. They are read and written a batch at a time, front to back, so that nothing is lost by
letting go of a batch's pages after each: they stay in the system's page cache. The files have no names and go with
their tensors.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qwen_quant.errors import ResourceError
from qwen_quant.quantize.heap import give_back_memory

POPULATE_READ, POPULATE_WRITE = 22, 23  # of madvise, which the module mmap does not name
BATCHES = 8  # after which freed memory is given back: after each it would cost more time


class _Mapped(mmap.mmap):
    """A file without a name, of this folder."""

    folder: Path


_maps: weakref.WeakValueDictionary[int, _Mapped] = (
    weakref.WeakValueDictionary()
)  # by where they begin in memory


def empty(shape: Sequence[int], folder: Path | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of any values: in memory, or in a file in `folder`.

    Raises ResourceError when the file does not fit there.
    """
    size = dtype.itemsize * math.prod(shape)
    if folder is None or not size:
        return torch.empty(tuple(shape), dtype=dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), size)
            mapped = _Mapped(file.fileno(), size)
    except OSError as error:
        raise ResourceError(
            f"{folder}: activations of {size / 1e9:.2f} GB do not fit there ({error.strerror or error}); choose "
            "another disk with -o, or lower --num-samples"
        ) from None
    mapped.folder = folder
    tensor = torch.frombuffer(mapped, dtype=dtype)
    _maps[tensor.data_ptr()] = mapped
    return tensor.view(tuple(shape))


def _reserve(descriptor: int, size: int) -> None:
    """Take the room on the disk at once: a page that finds none later would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def copy(x: Tensor, folder: Path | None) -> Tensor:
    """A copy of `x` on its device; on the CPU in a file in `folder`, where one is given."""
    if folder is None:
        return x.clone()
    found = empty(x.shape, folder, x.dtype)
    for into, part in zip(found, x, strict=True):
        into.copy_(part)
        let_go()
    return found


def _file_of(x: Tensor) -> _Mapped | None:
    """The file in which `x` lies, if it lies in one."""
    return _maps.get(x.untyped_storage().data_ptr())


def beside(hidden: Tensor, x: Tensor) -> Tensor:
    """`x`, or a copy of it in a file where `hidden` lies in one."""
    mapped = _file_of(hidden)
    return x if mapped is None else copy(x, mapped.folder)


def fetch(batch: Tensor, to_write: bool = False) -> None:
    """Map all pages of a batch at once, where it lies in a file: to find them missing one by one takes longer. Pages
    that are mapped `to_write` will be written to the disk."""
    mapped = _file_of(batch)
    if mapped is None:
        return
    begin = batch.data_ptr() - batch.untyped_storage().data_ptr()
    first = begin - begin % mmap.PAGESIZE
    with contextlib.suppress(OSError):  # before Linux 5.14
        mapped.madvise(
            POPULATE_WRITE if to_write else POPULATE_READ,
            first,
            begin + batch.numel() * batch.element_size() - first,
        )


def let_go(batch: int = 1) -> None:
    """No page of any file counts as memory of this process, until it is touched again; and, from time to time by the
    number of a `batch`, nothing that was freed, of which the C library holds more after each."""
    for reference in _maps.valuerefs():  # a list, made at once: other threads make files meanwhile
        if (mapped := reference()) is not None:
            mapped.madvise(mmap.MADV_DONTNEED)
    if _maps and batch % BATCHES == 0:
        give_back_memory()
