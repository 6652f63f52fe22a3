"""Writing GGUF files, which llama.cpp, Ollama and our own engine read.

Every shape and type is known from the spec, so the header is written first and the tensors follow one by one:
memory holds one tensor, or one decoder layer while the quantizer delivers them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, cast

import gguf
import numpy as np

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import FormatError
from qwen_quant.exporters import gguf_evidence
from qwen_quant.exporters.gguf_metadata import (
    add_kv_layout,
    add_metadata,
    architecture,
    check_expressible,
)
from qwen_quant.exporters.gguf_tensors import (
    Choice,
    choose_types,
    gguf_name,
    grid_choice,
    native_type,
    pack_tensor,
    stored_parts,
    stored_shape,
)
from qwen_quant.exporters.gguf_types import NO_OPTIONS, TypeOptions, file_type_of
from qwen_quant.files import atomic_file
from qwen_quant.grids.base import QuantizedTensor
from qwen_quant.grids.gguf import GRIDS, gguf_grid
from qwen_quant.grids.kv_layout import KVCacheSpec
from qwen_quant.progress import progress
from qwen_quant.quantize.recipe import GridChoice
from qwen_quant.quantize.stored import StoredTensor
from qwen_quant.tokenizer import Tokenizer

__all__ = [
    "FilePlan",
    "TypeOptions",
    "Written",
    "export_gguf",
    "native_type",
    "notes",
    "plan_file",
]


class Layer(Protocol):
    """A quantized decoder layer as the quantizer's stream yields it."""

    layer: int
    tensors: dict[str, QuantizedTensor]


@dataclass
class Written:
    """What `export_gguf` wrote: bytes, each tensor's GGUF type, and why some are not of the file's type."""

    bytes: int = 0
    types: dict[str, str] = field(default_factory=dict)
    layers: list[Any] = field(default_factory=list)
    unquantized: dict[str, str] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FilePlan:
    """A GGUF file before it is written: its type, and that of each tensor in order."""

    file_type: str
    choices: tuple[Choice, ...]

    @property
    def grids(self) -> GridChoice:
        """The grid of each matrix, as the quantizer asks for it."""
        return grid_choice(self.choices)

    @property
    def stored(self) -> list[StoredTensor]:
        """The tensors as a plan of memory and time counts them."""
        return [choice.planned for choice in self.choices]

    def fewest_bits(self, checkpoint: Checkpoint) -> int:
        """The coarsest rounding between the checkpoint and what the file's reader computes: 16 where there is hardly
        any. Integers of a GPTQ checkpoint are the same here and there; products with them round activations to 8."""
        blocks = [choice for choice in self.choices if choice.type in GRIDS]
        rounded = [c.type for c in blocks if not any(checkpoint.is_quantized(i.name) for i in c.stored)]
        return min([16, *(gguf_grid(kind).bits for kind in rounded), *([8] if blocks else [])])


def plan_file(
    checkpoint: Checkpoint, file_type: str | None = None, options: TypeOptions = NO_OPTIONS
) -> FilePlan:
    """Choose the types of a file of `file_type`, any of llama.cpp's names in gguf_mixes.py.

    Without a `file_type` it is what holds the integers of a GPTQ checkpoint, and F16 for any other. Raises UsageError
    for unknown types, FormatError for a model that GGUF readers do not know, or integers that a type cannot hold.
    """
    check_expressible(checkpoint)
    if file_type is None:
        file_type = "F16" if checkpoint.quantization is None else native_type(checkpoint)
    file_type = file_type_of(file_type)
    return FilePlan(file_type, tuple(choose_types(checkpoint, file_type, options)))


def export_gguf(
    checkpoint: Checkpoint,
    output: Path,
    file_type: str | None = None,
    options: TypeOptions = NO_OPTIONS,
    *,
    layers: Iterable[Layer] | None = None,
    record: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    kv_layout: KVCacheSpec | None = None,
    check: Callable[[Path], dict[str, Any]] | None = None,
) -> Written:
    """Write `checkpoint` as a GGUF file with the types of `plan_file`.

    `layers` delivers quantized decoder layers in order, on the grids of that plan; without it weights are rounded to
    nearest, and the integers of a GPTQ checkpoint are repacked unchanged. Norms and biases stay F32. `record` (the
    recipe) is written under `qwen_quant.*`, and `kv_layout`, the calibrated cache of keys and values, under
    `qwen_quant.kv_cache.*` as arrays, which llama.cpp leaves alone (it counts tensors). `check` runs the file before
    it gets its name; what it returns is written under `qwen_quant.check.*`, and an error of it leaves nothing behind.

    Raises what `plan_file` raises, FormatError when a tensor does not fit its type, CheckpointError for weights that
    are missing or not finite, OutputError when `output` cannot be written.
    """
    plan = plan_file(checkpoint, file_type, options)
    choices = plan.choices
    written = Written(types={c.info.name: c.type for c in choices})
    written.unquantized = {c.info.name: c.reason for c in choices if c.reason and c.type not in GRIDS}
    tokenizer = Tokenizer.from_folder(checkpoint.folder) if tokenizer is None else tokenizer
    with atomic_file(Path(output)) as path:
        writer = gguf.GGUFWriter(path, architecture(checkpoint.spec))
        try:
            if check is not None:
                gguf_evidence.reserve(writer)
            add_metadata(writer, checkpoint, tokenizer, plan.file_type, record or {})
            if kv_layout is not None:
                add_kv_layout(writer, checkpoint, kv_layout)
            _write_header(writer, choices)
            if layers is None:
                _write_stored(writer, checkpoint, choices)
            else:
                _write_layers(writer, checkpoint, choices, layers, written)
        finally:
            writer.close()
        if check is not None:
            written.check = check(path)
            gguf_evidence.fill(path, written.check)
        written.bytes = path.stat().st_size
    return written


def notes(checkpoint: Checkpoint) -> list[str]:
    """What a user should know about the file before it is written."""
    spec = checkpoint.spec
    if spec.plain_context == spec.context_length:
        return []
    return [
        f"context_length is {spec.plain_context} instead of {spec.context_length}: beyond that the model needs "
        "dual chunk attention, which GGUF readers do not have"
    ]


def _write_header(writer: gguf.GGUFWriter, choices: Iterable[Choice]) -> None:
    for choice in choices:
        kind = gguf.GGMLQuantizationType[choice.type]
        # float32 stands for "the shape counts weights, not bytes"; the type is `kind`.
        writer.add_tensor_info(
            gguf_name(choice.info),
            stored_shape(choice.info),
            np.dtype(np.float32),
            choice.nbytes,
            raw_dtype=kind,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


class _Parts:
    """Arrays written one after the other where GGUFWriter expects a single one."""

    def __init__(self, choice: Choice, parts: Iterable[np.ndarray]) -> None:
        self.nbytes = choice.nbytes
        self._choice, self._parts = choice, parts

    def tofile(self, stream: IO[bytes]) -> None:
        """Write the parts to `stream`. Raises FormatError when they are not as many bytes as announced."""
        written = 0
        for part in self._parts:
            stream.write(np.ascontiguousarray(part).data)
            written += part.nbytes
        if written != self.nbytes:
            raise FormatError(
                f"{self._choice.info.name}: has {written} bytes where its shape needs {self.nbytes}"
            )


def _write(writer: gguf.GGUFWriter, choice: Choice, parts: Iterable[np.ndarray]) -> None:
    # The writer asks an array for its size and `tofile` only; pieces spare the memory of a whole embedding.
    array = cast("np.ndarray[Any, Any]", _Parts(choice, parts))
    writer.write_tensor_data(array, tensor_endianess=gguf.GGUFEndian.LITTLE)


def _write_stored(writer: gguf.GGUFWriter, checkpoint: Checkpoint, choices: Sequence[Choice]) -> None:
    """Every tensor from the checkpoint as it is."""
    with progress("writing", len(choices)) as advance:
        for choice in choices:
            _write(writer, choice, stored_parts(checkpoint, choice))
            advance(1, choice.info.name)


def _write_layers(
    writer: gguf.GGUFWriter,
    checkpoint: Checkpoint,
    choices: Sequence[Choice],
    layers: Iterable[Layer],
    written: Written,
) -> None:
    """Each layer as it arrives; its weights are let go. Last what lies outside, solved or from the checkpoint."""
    outer: Layer | None = None
    count = 0
    for layer in layers:
        written.layers.append(layer)
        if layer.layer < 0:
            outer = layer
            continue
        for choice in (c for c in choices if c.info.layer == count):
            _write(writer, choice, _layer_parts(checkpoint, choice, layer))
        layer.tensors.clear()
        count += 1
    if count != checkpoint.spec.num_hidden_layers:
        raise FormatError(f"{checkpoint.folder}: {count} layers came of {checkpoint.spec.num_hidden_layers}")
    for choice in (c for c in choices if c.info.layer < 0):
        if outer is not None and choice.info.name in outer.tensors:
            _write(writer, choice, _layer_parts(checkpoint, choice, outer))
        else:
            _write(writer, choice, stored_parts(checkpoint, choice))
    if outer is not None:
        outer.tensors.clear()


def _layer_parts(checkpoint: Checkpoint, choice: Choice, layer: Layer) -> Iterator[np.ndarray]:
    if choice.type not in GRIDS:
        yield from stored_parts(checkpoint, choice)
        return
    for info in choice.stored:
        where = f"{checkpoint.folder}: {info.name}"
        tensor = layer.tensors.get(info.name)
        if tensor is None:
            raise FormatError(f"{where}: is {choice.type} in this file, but was not quantized")
        # Packing takes several bytes a weight, and an embedding has as many weights as some layers.
        pieces = checkpoint.source.pieces(info.name) if info.layer < 0 else [slice(None)]
        for rows in pieces:
            yield pack_tensor(where, tensor.rows(rows), gguf_grid(choice.type))
