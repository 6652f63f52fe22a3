"""TensorSource: the tensors of a folder of safetensors shards, found by name and read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qwen_quant.errors import CheckpointError
from qwen_quant.moe import Fused
from qwen_quant.safetensors import SafetensorsFile, bf16_to_f32

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHUNK_BYTES = 32 << 20  # a piece of a tensor that is copied or scanned in pieces
FLOATS = ("F64", "F32", "F16", "BF16")


class TensorSource:
    """The tensors of a folder of safetensors shards, by name; nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, SafetensorsFile] = {}
        self._shard_of = self._find_shards()

    def _find_shards(self) -> dict[str, str]:
        if (self.folder / SINGLE).exists():  # before an index, as transformers has it
            return dict.fromkeys(self._file(SINGLE).entries, SINGLE)
        index = self.folder / INDEX
        if index.exists():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                mapping = {str(name): str(shard) for name, shard in weight_map.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise CheckpointError(f"{index}: is not a shard index; download it again") from None
            for shard in sorted(set(mapping.values())):
                if Path(shard).name != shard or not (self.folder / shard).is_file():
                    raise CheckpointError(
                        f"{self.folder / shard}: this shard is missing ({INDEX} names it); download it again"
                    )
            return mapping
        if any(self.folder.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{self.folder}: holds pickled pytorch_model.bin weights, which are not read for safety; "
                "convert them to safetensors first"
            )
        raise CheckpointError(f"{self.folder / SINGLE}: not found; MODEL must hold safetensors weights")

    def _file(self, shard: str) -> SafetensorsFile:
        if shard not in self._files:
            self._files[shard] = SafetensorsFile(self.folder / shard)
        return self._files[shard]

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._shard_of)

    def _locate(self, name: str) -> SafetensorsFile:
        if name not in self._shard_of:
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} is missing; the checkpoint is incomplete or of another architecture"
            )
        file = self._file(self._shard_of[name])
        if name not in file.entries:
            raise CheckpointError(f"{file.path}: tensor {name!r} is missing, but {INDEX} places it there")
        return file

    def dtype(self, name: str) -> str:
        """The stored dtype as safetensors names it (BF16, F16, I32 …)."""
        return self._locate(name).entries[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._locate(name).entries[name].shape

    def split(self, fused: Fused) -> None:
        """Know a fused tensor as its parts from now on. Nothing is read: a part is a place in the file like any
        other tensor. Raises CheckpointError when it has another shape."""
        file = self._locate(fused.name)
        shape = file.entries[fused.name].shape
        if shape != fused.shape:
            raise CheckpointError(
                f"{file.path}: tensor {fused.name!r} has shape {list(shape)}, config.json says "
                f"{list(fused.shape)}; config.json and weights do not belong together"
            )
        file.split(fused.name, fused.parts)
        shard = self._shard_of.pop(fused.name)
        self._shard_of |= dict.fromkeys((name for name, _ in fused.parts), shard)

    def read_raw(self, name: str) -> np.ndarray:
        """The stored array; BF16 as uint16 bit patterns."""
        return self._locate(name).read_raw(name)

    def _pieces(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A float tensor in pieces along its first dimension, each as stored and as float32; raises as `read`."""
        file = self._locate(name)
        for rows in self.pieces(name):
            raw = file.read_raw(name, rows.start, rows.stop)
            yield raw, self._floats(file, name, raw)

    def pieces(self, name: str) -> list[slice]:
        """The rows of a tensor in runs that are read at once."""
        entry = self._locate(name).entries[name]
        rows = entry.shape[0] if entry.shape else 1
        step = max(1, rows * CHUNK_BYTES // max(1, entry.nbytes))
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def raw_chunks(self, name: str) -> Iterator[np.ndarray]:
        """The stored array in pieces, checked as `read` does: for copying what is too big to hold."""
        return (raw for raw, _ in self._pieces(name))

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """`read` in pieces along the first dimension."""
        return (values for _, values in self._pieces(name))

    def read_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The given rows (sorted indices) of a matrix as float32 [len(rows), columns]."""
        found, start = [], 0
        for part in self.chunks(name):
            mine = rows[(rows >= start) & (rows < start + len(part))]
            found.append(part[mine - start])
            start += len(part)
        return np.concatenate(found)

    def read(self, name: str, rows: slice = slice(0, None)) -> np.ndarray:
        """A floating-point tensor, or a run of its rows, as float32.

        Raises CheckpointError when it is not finite or not of floats.
        """
        file = self._locate(name)
        return self._floats(file, name, file.read_raw(name, rows.start, rows.stop))

    def _floats(self, file: SafetensorsFile, name: str, raw: np.ndarray) -> np.ndarray:
        dtype = file.entries[name].dtype
        if dtype not in FLOATS:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} has dtype {dtype}, where a float type belongs"
            )
        values = bf16_to_f32(raw) if dtype == "BF16" else raw.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            bad = int(values.size - np.isfinite(values).sum())
            raise CheckpointError(
                f"{file.path}: tensor {name!r} holds {bad} NaN or infinite values; download the checkpoint again"
            )
        return values
