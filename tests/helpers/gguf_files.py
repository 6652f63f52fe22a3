"""Reading and changing GGUF files with the gguf library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

VALUE_TYPES = {
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
    str: gguf.GGUFValueType.STRING,
}


def decoded(reader: gguf.GGUFReader, name: str) -> np.ndarray:
    """A tensor as float32 in its own shape, decoded by the gguf library."""
    tensor = next(t for t in reader.tensors if t.name == name)
    kind = gguf.GGMLQuantizationType(tensor.tensor_type)
    shape = tuple(int(n) for n in tensor.shape[::-1])
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return np.asarray(tensor.data, dtype=np.float32).reshape(shape)
    return dequantize(tensor.data, kind).astype(np.float32).reshape(shape)


def type_of(reader: gguf.GGUFReader, name: str) -> str:
    return next(t for t in reader.tensors if t.name == name).tensor_type.name


def changed(
    path: Path, target: Path, keys: Mapping[str, Any] | None = None, without: str | None = None
) -> Path:
    """A copy of a GGUF file with other values of `<architecture>.<key>`, and no tensor whose name ends in `without`."""
    reader = gguf.GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    new = {f"{architecture}.{key}": value for key, value in (keys or {}).items()}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in new:
            writer.add_key_value(key, field.contents(), *field.types[:2])
    for key, value in new.items():
        writer.add_key_value(key, value, VALUE_TYPES[type(value)])
    for tensor in reader.tensors:
        if without is None or not tensor.name.endswith(without):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
