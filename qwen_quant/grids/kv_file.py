"""A calibrated layout of the key/value cache on disk: a small safetensors file, and arrays for GGUF metadata.

Both hold the same eight arrays, of keys and of values: `bits` and `hadamard` [layers], `centre` and `balance` [layers,
n_kv_heads, head_dim], where a centre of zeros and a balance of ones stand for none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen_quant.errors import CheckpointError, FormatError
from qwen_quant.files import atomic_file
from qwen_quant.grids.kv import Half, KVGrid, TokenGroups
from qwen_quant.grids.kv_layout import RECENT, KVCacheSpec, KVLayer, KVLayout
from qwen_quant.safetensors import Planned, SafetensorsFile, SafetensorsWriter, storage_dtype

FILE_NAME = "kv_cache.safetensors"  # within a checkpoint folder
RECORD = "qwen_quant.kv_cache"  # the metadata key that marks such a file
HALVES = ("key", "value")
VECTORS = ("centre", "balance")


def as_arrays(spec: KVCacheSpec, n_kv_heads: int, head_dim: int) -> dict[str, np.ndarray]:
    """The layout as arrays `key_bits`, `key_hadamard`, `key_centre`, `key_balance`, and the same of values."""
    found: dict[str, np.ndarray] = {}
    shape = (n_kv_heads, head_dim)
    for half, layouts in (
        ("key", [layer.keys for layer in spec.layers]),
        ("value", [layer.values for layer in spec.layers]),
    ):
        for layout in layouts:
            if not isinstance(layout.grid, (Half, TokenGroups)):
                raise FormatError(
                    f"the {layout.grid.name} cache is for measuring only; store int8, int4 or auto"
                )
        found[f"{half}_bits"] = np.array([layout.grid.bits for layout in layouts], dtype=np.int32)
        found[f"{half}_hadamard"] = np.array([layout.hadamard for layout in layouts], dtype=np.int32)
        for field, none in (("centre", 0.0), ("balance", 1.0)):
            vectors = [getattr(layout, field) for layout in layouts]
            filled = [np.full(shape, none) if v is None else np.asarray(v) for v in vectors]
            found[f"{half}_{field}"] = np.stack(filled).astype(np.float32)
    return found


def from_arrays(name: str, arrays: Mapping[str, np.ndarray]) -> KVCacheSpec:
    """The inverse of `as_arrays`."""
    halves: list[list[KVLayout]] = []
    for half in HALVES:
        layouts = []
        for index, bits in enumerate(arrays[f"{half}_bits"].tolist()):
            centre, balance = (arrays[f"{half}_{field}"][index] for field in VECTORS)
            grid: KVGrid = Half() if bits == 16 else TokenGroups(bits)
            layouts.append(
                KVLayout(
                    grid,
                    centre if centre.any() else None,
                    None if (balance == 1).all() else balance,
                    bool(arrays[f"{half}_hadamard"][index]),
                )
            )
        halves.append(layouts)
    layers = tuple(KVLayer(keys, values) for keys, values in zip(*halves, strict=True))
    return KVCacheSpec(name, layers, RECENT)


def write_kv_file(
    path: Path, spec: KVCacheSpec, n_kv_heads: int, head_dim: int, record: Mapping[str, Any]
) -> None:
    """Write the layout, with what `record` says of its origin. Raises OutputError when `path` cannot be written."""
    arrays = as_arrays(spec, n_kv_heads, head_dim)
    planned = [Planned(name, storage_dtype(array), array.shape) for name, array in arrays.items()]
    text = json.dumps({"name": spec.name, **record}, ensure_ascii=False, sort_keys=True)
    with atomic_file(path) as partial, SafetensorsWriter(partial, planned, {RECORD: text}) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def read_kv_file(
    path: Path, n_layers: int, n_kv_heads: int, head_dim: int
) -> tuple[KVCacheSpec, dict[str, Any]]:
    """The layout in `path` and its record. Raises FormatError when the file is none or of another model."""
    try:
        file = SafetensorsFile(path)
    except CheckpointError as error:
        raise FormatError(f"{error}; make one with `qwen-quant kv`") from None
    text = file.metadata.get(RECORD)
    if text is None:
        raise FormatError(f"{path}: holds no layout of the KV cache; make one with `qwen-quant kv`")
    shapes: dict[str, tuple[int, ...]] = {}
    for half in HALVES:
        shapes |= {f"{half}_{field}": (n_layers,) for field in ("bits", "hadamard")}
        shapes |= {f"{half}_{field}": (n_layers, n_kv_heads, head_dim) for field in VECTORS}
    for name, shape in shapes.items():
        entry = file.entries.get(name)
        if entry is None or entry.shape != shape:
            found = "missing" if entry is None else f"{list(entry.shape)}"
            raise FormatError(
                f"{path}: {name} is {found} where this model needs {list(shape)}; run `qwen-quant kv` on this model"
            )
    arrays = {name: file.read_raw(name) for name in shapes}
    check_arrays(str(path), arrays)
    record = json.loads(text)
    return from_arrays(str(record.get("name", "auto")), arrays), record


def check_arrays(where: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise FormatError for values that no layout has; `where` names their file."""
    for half in HALVES:
        if not np.isin(arrays[f"{half}_bits"], (4, 8, 16)).all():
            raise FormatError(
                f"{where}: {half}_bits has other values than 4, 8 and 16; run `qwen-quant kv` again"
            )
        centre, balance = (arrays[f"{half}_{field}"] for field in VECTORS)
        if not (np.isfinite(centre).all() and np.isfinite(balance).all() and (balance > 0).all()):
            raise FormatError(
                f"{where}: the {half}s' centre or balance is not usable; run `qwen-quant kv` again"
            )
