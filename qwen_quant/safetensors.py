"""Safetensors files read lazily with every header field checked, and written tensor by tensor.

Format: https://github.com/huggingface/safetensors#format. An 8-byte little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}}, then the data. Arrays come as NumPy; BF16, which NumPy lacks, as uint16.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from qwen_quant.errors import CheckpointError, FormatError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_DIMS = 8  # far more than any tensor of a model has
MAX_SIZE = 2**48  # bytes or elements: beyond any file, and small enough for NumPy
STORAGE: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """BF16 bit patterns (uint16, any shape) as float32: the upper half of the same number."""
    wide = np.left_shift(bits, np.uint32(16), dtype=np.uint32)
    return wide.view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 as BF16 bit patterns (uint16), rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def encode_floats(where: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as F32, F16 or BF16 stores them, the last as bit patterns.

    Raises FormatError naming `where` for values that F16 cannot hold.
    """
    if dtype == "BF16":
        return f32_to_bf16(values)
    if dtype != "F16":
        return values.astype("<f4", copy=False)
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    if not np.isfinite(half).all():
        raise FormatError(f"{where}: holds values beyond FP16's 65504; export with --type BF16")
    return half


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `offset` and `nbytes` are in bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


class SafetensorsFile:
    """One shard: the header is validated on opening; `read_raw` reads one tensor."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self.size = self.path.stat().st_size
            with self.path.open("rb") as file:
                self.entries, self.metadata = self._parse(file.read(8), file.read)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); download it again") from None

    def _broken(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {why}; the file is damaged or cut, download it again")

    def _parse(self, prefix: bytes, read: Any) -> tuple[dict[str, Entry], dict[str, str]]:
        if len(prefix) < 8:
            raise self._broken(f"only {self.size} bytes, no safetensors header")
        length = int.from_bytes(prefix, "little")
        if length > min(self.size - 8, MAX_HEADER_BYTES):
            raise self._broken(f"header length {length} does not fit a file of {self.size} bytes")
        try:
            header = json.loads(read(length))
        except (ValueError, RecursionError):
            raise self._broken("header is not JSON") from None
        if not isinstance(header, dict):
            raise self._broken("header is not a JSON object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise self._broken(f"__metadata__ is {metadata!r}, not an object")
        entries = {name: self._entry(name, fields, 8 + length) for name, fields in header.items()}
        self._check_overlaps(entries)
        return entries, metadata

    def _check_overlaps(self, entries: Mapping[str, Entry]) -> None:
        placed = sorted((entry for entry in entries.values() if entry.nbytes), key=lambda entry: entry.offset)
        for first, second in itertools.pairwise(placed):
            if second.offset < first.offset + first.nbytes:
                raise self._broken(f"tensors {first.name!r} and {second.name!r} overlap")

    def _entry(self, name: str, fields: Any, start: int) -> Entry:
        if not isinstance(fields, dict):
            raise self._broken(f"tensor {name!r} has no description")
        dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in STORAGE:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has dtype {dtype!r}, which is not supported "
                f"(known: {', '.join(STORAGE)}); convert the checkpoint to BF16"
            )
        if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_whole(n) for n in shape):
            raise self._broken(f"tensor {name!r} has shape {shape!r}")
        if math.prod(n or 1 for n in shape) > MAX_SIZE:  # NumPy refuses these even when one dimension is 0
            raise self._broken(f"tensor {name!r} has shape {shape!r}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(_whole(n) for n in offsets):
            raise self._broken(f"tensor {name!r} has data_offsets {offsets!r}")
        nbytes = math.prod(shape) * STORAGE[dtype].itemsize
        if offsets[1] - offsets[0] != nbytes:
            raise self._broken(f"tensor {name!r} has {offsets[1] - offsets[0]} bytes where {nbytes} belong")
        if start + offsets[1] > self.size:
            raise self._broken(f"tensor {name!r} ends at byte {start + offsets[1]} of {self.size}")
        return Entry(name, dtype, tuple(shape), start + offsets[0], nbytes)

    def split(self, name: str, parts: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Replace tensor `name` by the tensors (name and shape) that lie in it one after the other."""
        whole = self.entries.pop(name)
        offset = whole.offset
        for part, shape in parts:
            nbytes = math.prod(shape) * STORAGE[whole.dtype].itemsize
            self.entries[part] = Entry(part, whole.dtype, shape, offset, nbytes)
            offset += nbytes

    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The stored array of tensor `name` (BF16 as uint16), or its rows start … stop, read from disk now."""
        entry = self.entries[name]
        shape = entry.shape
        if shape:
            stop = shape[0] if stop is None else min(stop, shape[0])
            shape = (max(0, stop - start), *shape[1:])
        row_bytes = math.prod(entry.shape[1:]) * STORAGE[entry.dtype].itemsize
        data = np.empty(math.prod(shape) * STORAGE[entry.dtype].itemsize, dtype=np.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry.offset + start * row_bytes)
                view, got = data.data, 0
                while got < len(data):
                    count = file.readinto(view[got:])
                    if not count:
                        raise self._broken(f"ends within tensor {name!r}")
                    got += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror}); check the disk") from None
        return data.view(STORAGE[entry.dtype]).reshape(shape)


def storage_dtype(array: np.ndarray) -> str:
    """The safetensors dtype of a NumPy array; uint16 means BF16, the only 16-bit pattern we store."""
    for name, dtype in STORAGE.items():
        if dtype == array.dtype:
            return name
    raise TypeError(f"no safetensors dtype for {array.dtype}")


@dataclass(frozen=True)
class Planned:
    """A tensor whose dtype and shape are known before its values are."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * STORAGE[self.dtype].itemsize


class SafetensorsWriter:
    """Write a shard whose tensors are planned first and delivered one at a time, in any order.

    Raises CheckpointError from `close` when a planned tensor was never delivered.
    """

    def __init__(
        self, path: Path, planned: Iterable[Planned], metadata: Mapping[str, str] | None = None
    ) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        self._missing: dict[str, tuple[Planned, int]] = {}
        end = 0
        for tensor in planned:
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [end, end + tensor.nbytes],
            }
            self._missing[tensor.name] = (tensor, end)
            end += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data starts aligned
        self.path = Path(path)
        self._start = 8 + len(text)
        self._file = self.path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + end)

    def write(self, name: str, array: np.ndarray) -> None:
        """Store one planned tensor (BF16 as uint16)."""
        self.write_rows(name, iter((array,)))

    def write_rows(self, name: str, parts: Iterator[np.ndarray]) -> None:
        """Store one planned tensor that comes in pieces along its first dimension."""
        tensor, offset = self._missing.pop(name)
        self._file.seek(self._start + offset)
        rows = 0
        for part in parts:
            if storage_dtype(part) != tensor.dtype or part.shape[1:] != tensor.shape[1:]:
                raise TypeError(
                    f"{name}: {part.dtype} {part.shape} where {tensor.dtype} {tensor.shape} is planned"
                )
            self._file.write(np.ascontiguousarray(part).data)
            rows += part.shape[0] if part.shape else 1
        if rows != (tensor.shape[0] if tensor.shape else 1):
            raise TypeError(f"{name}: {rows} rows where {tensor.shape} is planned")

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._missing:
            raise CheckpointError(f"{self.path}: tensor {next(iter(self._missing))!r} was never written")

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
