"""Writing ONNX folders, which onnxruntime, onnxruntime-genai, Optimum, transformers.js and our own Session open.

The graph is built directly, never traced. Every layer is written as it arrives: memory holds one tensor, or one
decoder layer while the quantizer delivers them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from qwen_quant import __version__
from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import FormatError, UsageError
from qwen_quant.exporters.onnx_accuracy import AUTO, LEVELS, choose_levels, set_level
from qwen_quant.exporters.onnx_choices import (
    Choice,
    check_type,
    choose_types,
    file_grid,
    native_type,
)
from qwen_quant.exporters.onnx_folder import GRAPH_FOLDER, graph_name, write_card, write_folder
from qwen_quant.exporters.onnx_fused import FusedOps
from qwen_quant.exporters.onnx_graph import Graph, WeightFile, add_metadata
from qwen_quant.exporters.onnx_model import build
from qwen_quant.exporters.onnx_ops import Ops
from qwen_quant.exporters.onnx_standard import StandardOps
from qwen_quant.exporters.onnx_weights import Layer, Weights
from qwen_quant.files import atomic_folder
from qwen_quant.grids.gptq import IntGrid
from qwen_quant.progress import progress
from qwen_quant.quantize.kv_ranges import ChannelScales
from qwen_quant.quantize.recipe import GridChoice
from qwen_quant.quantize.stored import StoredTensor
from qwen_quant.spec import TensorInfo
from qwen_quant.tokenizer import Tokenizer

__all__ = ["Form", "Written", "export_onnx", "notes", "stored_tensors"]


@dataclass(frozen=True)
class Form:
    """What an ONNX file is to be: `file_type` None takes a GPTQ checkpoint's own, else F16.

    `accuracy_level` is 0, 4 or auto (see onnx_accuracy), `opset` None means onnxruntime's fused operators.
    """

    file_type: str | None = None
    group_size: int = 128
    sym: bool = True
    token_embedding_type: str | None = None
    output_tensor_type: str | None = None
    opset: int | None = None
    accuracy_level: str = "0"

    @property
    def operators(self) -> type[Ops]:
        """Fused operators, or standard ones when an opset is asked for. Raises UsageError for another opset."""
        if self.opset not in (None, StandardOps.opset):
            raise UsageError(
                f"--opset {self.opset}: not supported; {StandardOps.opset} has all that is needed"
            )
        return FusedOps if self.opset is None else StandardOps

    def resolved(self, checkpoint: Checkpoint) -> tuple[str, IntGrid | None]:
        """The type, and the grid of linear layers that have none yet. Raises UsageError for unknown types."""
        kind = native_type(checkpoint) if self.file_type is None else check_type(self.file_type)
        return kind, file_grid(kind, self.group_size, self.sym)

    def choices(self, checkpoint: Checkpoint) -> dict[str, Choice]:
        """The type of each tensor. Raises as `choose_types`."""
        outer = [
            None if chosen is None else check_type(chosen, option)
            for option, chosen in (
                ("--token-embedding-type", self.token_embedding_type),
                ("--output-tensor-type", self.output_tensor_type),
            )
        ]
        kind, grid = self.resolved(checkpoint)
        # Beside a GPTQ checkpoint's integers lie an embedding and a head of 16 bits, which nothing calibrates here; and
        # standard operators look up no 4-bit integers.
        solved = checkpoint.quantization is None and self.operators is FusedOps
        return choose_types(checkpoint, kind, grid, kind if solved else "int8", *outer)

    def grids(self, checkpoint: Checkpoint) -> GridChoice:
        """The grid of each tensor that is to be quantized, as the quantizer asks for it."""
        choices = self.choices(checkpoint)
        return lambda info: choices[info.name].grid

    def fewest_bits(self, checkpoint: Checkpoint) -> int:
        """The coarsest rounding between the checkpoint and what the graph computes: 16 where there is hardly any."""
        rounded = [
            choice.grid.bits
            for name, choice in self.choices(checkpoint).items()
            if choice.grid is not None and not checkpoint.is_quantized(name)
        ]
        integers = any(choice.grid is not None for choice in self.choices(checkpoint).values())
        activations = [8] if integers and self.accuracy_level != "0" else []
        return min([16, *rounded, *activations])


@dataclass
class Written:
    """What `export_onnx` wrote: bytes, each tensor's type, and why some are not of the file's type."""

    bytes: int = 0
    types: dict[str, str] = field(default_factory=dict)
    layers: list[Any] = field(default_factory=list)
    unquantized: dict[str, str] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)


def export_onnx(
    checkpoint: Checkpoint,
    output: Path,
    form: Form | None = None,
    *,
    layers: Iterable[Layer] | None = None,
    record: Mapping[str, Any] | None = None,
    texts: npt.NDArray[np.integer] | None = None,
    check: Callable[[Path], dict[str, Any]] | None = None,
    cache: ChannelScales | None = None,
    overwrite: bool = False,
) -> Written:
    """Write `checkpoint` as an ONNX folder.

    `layers` delivers quantized decoder layers in order, on the grids of `form`, and last embedding and head (rounded to
    nearest if they do not come); without it the integers of a GPTQ checkpoint are carried over unchanged, or floats
    are stored. `record` (the recipe) goes into the graph's metadata.
    `texts`, token windows [n, T], are what accuracy_level auto measures with. `cache` has the scales of a quantized
    cache of keys and values. `check` runs the folder before it gets its name; what it returns is written beside the
    recipe, and an error of it leaves nothing behind.

    Raises UsageError for unknown types, FormatError for what ONNX's operators cannot hold, CheckpointError for
    weights that are missing or not finite, ConfigError for a tokenizer that cannot be read, OutputError when `output`
    cannot be written.
    """
    form = form or Form()
    kind, grid = form.resolved(checkpoint)
    if grid is not None and layers is None and checkpoint.quantization is None:
        raise UsageError(f"--type {kind}: {checkpoint.folder} has to be quantized first")
    if form.accuracy_level not in (*LEVELS, AUTO):
        raise UsageError(f"--accuracy-level {form.accuracy_level}: choose 0, 4 or auto")
    choices, tokenizer = form.choices(checkpoint), Tokenizer.from_folder(checkpoint.folder)
    written = Written(types={name: choice.name for name, choice in choices.items()})
    written.unquantized = {
        name: choice.reason for name, choice in choices.items() if choice.reason and choice.grid is None
    }
    with atomic_folder(Path(output), overwrite) as folder:
        file = folder / GRAPH_FOLDER / graph_name(kind)
        file.parent.mkdir()
        with WeightFile(file.with_name(f"{file.name}_data")) as data:
            graph = Graph(data, form.operators.opset)
            ops = form.operators(graph, Weights(checkpoint, choices), checkpoint.spec, cache)
            build(graph, ops, _arriving(checkpoint, layers, written), checkpoint.spec.plain_context)
        onnx.save_model(graph.model(checkpoint.folder.resolve().name), file)
        facts = {"version": __version__, **(record or {})}
        if cache is not None:
            facts["kv_cache"] = f"int{cache.bits}"
        facts |= _set_accuracy(file, form, texts)
        write_folder(checkpoint, tokenizer, folder, file, kind, ops, form.accuracy_level)
        if check is not None:
            written.check = facts["check"] = check(folder)
        add_metadata(file, {f"qwen_quant.{key}": value for key, value in facts.items()})
        write_card(folder, checkpoint, file, written.types, facts)
        written.bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return written


def notes(checkpoint: Checkpoint) -> list[str]:
    """What a user should know about the folder before it is written."""
    spec = checkpoint.spec
    if spec.plain_context == spec.context_length:
        return []
    return [
        f"the context ends at {spec.plain_context} tokens instead of {spec.context_length}: beyond that the model "
        "needs dual chunk attention, which ONNX has no operator for"
    ]


def stored_tensors(checkpoint: Checkpoint, form: Form) -> list[StoredTensor]:
    """What `export_onnx` would write, experts of a kind as one entry. Raises as it does."""
    found: dict[str, StoredTensor] = {}
    for choice in form.choices(checkpoint).values():
        new, info = choice.planned, choice.info
        name = info.name if info.expert < 0 else info.name.replace(f".experts.{info.expert}.", ".experts.*.")
        before = found.get(name)
        found[name] = StoredTensor(
            TensorInfo(name, info.shape, info.role, info.layer),
            new.kind,
            new.nbytes + (before.nbytes if before else 0),
            new.quantized,
            before.count + 1 if before else 1,
        )
    return list(found.values())


def _arriving(
    checkpoint: Checkpoint, layers: Iterable[Layer] | None, written: Written
) -> Iterator[Layer | None]:
    """Each layer in turn: as the quantizer hands it over, or None for the checkpoint's own weights; last what was
    solved outside the layers."""
    total = checkpoint.spec.num_hidden_layers
    if layers is None:
        with progress("writing", total) as advance:
            for index in range(total):
                yield None
                advance(1, f"layer {index}")
        return
    count = 0
    for layer in layers:
        yield layer
        written.layers.append(layer)
        count += layer.layer >= 0
    if count != total:
        raise FormatError(f"{checkpoint.folder}: {count} layers came of {total}")


def _set_accuracy(file: Path, form: Form, texts: npt.NDArray[np.integer] | None) -> dict[str, Any]:
    """Decide how the graph's integer products compute; what there is to tell about it."""
    if form.opset is not None:
        return {}
    if form.accuracy_level != AUTO:
        set_level(file, LEVELS[form.accuracy_level])
        return {}
    if texts is None:
        raise UsageError("--accuracy-level auto: needs texts to measure with")
    found = choose_levels(file, texts)
    return {"accuracy": found.summary} if found.exact or found.fast else {}
