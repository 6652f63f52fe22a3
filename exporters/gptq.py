"""Writing GPTQ checkpoints: the safetensors layout that AutoGPTQ, GPTQModel, Optimum and vLLM read.

Tensors are streamed: every shape is known from the spec, so shards are laid out first and filled layer by layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_quant import __version__
from qwen_quant.checkpoint import INDEX, Checkpoint
from qwen_quant.config import config_for_all_readers
from qwen_quant.errors import FormatError
from qwen_quant.exporters.gptq_shards import ShardSet, shards_of, write_index
from qwen_quant.files import SIDE_FILES, atomic_folder, copy_side_files
from qwen_quant.grids.gptq import GPTQ_FORMATS, GROUP_SIZES, IntGrid, pack
from qwen_quant.names import HEAD
from qwen_quant.quantize.layer import QuantizedLayer
from qwen_quant.quantize.recipe import Recipe
from qwen_quant.quantize.stored import StoredTensor
from qwen_quant.safetensors import Planned
from qwen_quant.spec import TensorInfo

# Checkpoints of Qwen (1) come with their model's code (auto_map), which we never run but other readers need.
CODE = "*.py"
NOT_COPIED = ("config.json", "quantize_config.json", INDEX)


@dataclass
class Written:
    """What `export_gptq` wrote: bytes, how each tensor is stored, and why some are left in full precision."""

    bytes: int = 0
    types: dict[str, str] = field(default_factory=dict)
    layers: list[QuantizedLayer] = field(default_factory=list)
    unquantized: dict[str, str] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)


def quantization_config(
    grid: IntGrid, recipe: Recipe, record: dict[str, Any], stored_format: str
) -> dict[str, Any]:
    """`quantization_config` of config.json, also the whole of quantize_config.json (auto-gptq reads only that)."""
    return {
        "bits": grid.bits,
        "group_size": grid.group_size,
        "quant_method": "gptq",
        "checkpoint_format": stored_format,
        "desc_act": recipe.desc_act,
        "sym": grid.sym,
        "damp_percent": recipe.damp_percent,
        "true_sequential": True,
        "static_groups": not recipe.desc_act,
        "lm_head": False,
        "meta": {"quantizer": [f"qwen-quant:{__version__}"], "recipe": record},
    }


def export_gptq(
    checkpoint: Checkpoint,
    layers: Iterable[QuantizedLayer],
    output: Path,
    grid: IntGrid,
    recipe: Recipe,
    record: dict[str, Any],
    *,
    checkpoint_format: str = GPTQ_FORMATS[0],
    max_shard_bytes: int = 4 << 30,
    tied_head: bool = True,
    check: Callable[[Path], dict[str, Any]] | None = None,
    overwrite: bool = False,
) -> Written:
    """Write a GPTQ checkpoint folder from `layers`, which arrive in order and are written as they come.

    `record` (the recipe with data hashes) is embedded under `meta`. A tied head is stored a second time unless
    `tied_head` is False, because auto-gptq leaves it uninitialised otherwise. `check` tries the folder before it gets
    its name; what it returns stands beside the recipe, and an error of it leaves nothing behind.

    Raises FormatError when a shape cannot be packed, OutputError when `output` cannot be written.
    """
    check_packable(checkpoint)
    planned = list(_plan(checkpoint, grid, tied_head))
    shards = shards_of(planned, max_shard_bytes)
    written = Written(types=_types(checkpoint, grid, tied_head))
    config = quantization_config(grid, recipe, record, checkpoint_format)
    if checkpoint.spec.moe is not None:
        config["modules_in_block_to_quantize"] = quantized_modules(checkpoint)
    with atomic_folder(output, overwrite) as folder:
        with ShardSet(folder, shards) as out:
            _write_tensors(checkpoint, layers, out, written, checkpoint_format, tied_head)
        _copy_files(checkpoint, folder)
        _write_configs(checkpoint, folder, config)
        write_index(folder, shards)
        if check is not None:
            config["meta"]["check"] = written.check = check(folder)
            _write_configs(checkpoint, folder, config)
        written.bytes = sum(path.stat().st_size for path in folder.iterdir())
    written.unquantized = _reasons(checkpoint)
    return written


def _write_tensors(
    checkpoint: Checkpoint,
    layers: Iterable[QuantizedLayer],
    out: ShardSet,
    written: Written,
    checkpoint_format: str,
    tied_head: bool,
) -> None:
    """Each layer as it arrives; its integers are let go. Last what lies outside."""
    for layer in layers:
        for info in checkpoint.spec.layer_tensors(layer.layer):
            if info.name in layer.tensors:
                packed = pack(layer.tensors[info.name], checkpoint_format)
                for part, array in vars(packed).items():
                    out.writer(f"{_stem(info)}{part}").write(f"{_stem(info)}{part}", array)
            else:
                _copy(checkpoint, info.name, info.name, out)
        layer.tensors.clear()
        written.layers.append(layer)
    for info in checkpoint.spec.outer_tensors():
        _copy(checkpoint, info.name, info.name, out)
    if checkpoint.spec.tie_word_embeddings and tied_head:
        _copy(checkpoint, _embedding(checkpoint), f"{HEAD}.weight", out)


def quantized_modules(checkpoint: Checkpoint) -> list[list[str]]:
    """The quantized modules of a block, in the order of the computation: readers that replace every linear layer
    need it, for the routers are linear layers too."""
    stages: dict[str, dict[str, None]] = {}
    for info in checkpoint.spec.tensors():
        if info.role == "linear":
            module = info.name.removeprefix(checkpoint.spec.names.layer(info.layer)).removesuffix(".weight")
            stage = {"q_proj": "q", "k_proj": "q", "v_proj": "q", "gate_proj": "up", "up_proj": "up"}
            kind = module.rpartition(".")[2]
            stages.setdefault(stage.get(kind, kind), {})[module] = None
    return [list(modules) for modules in stages.values()]


def check_packable(checkpoint: Checkpoint) -> None:
    """Raise FormatError for a linear whose sizes the packing cannot hold: K and N must be multiples of 32."""
    for info in checkpoint.spec.tensors():
        if info.role == "linear" and (info.shape[0] % 32 or info.shape[1] % 32):
            raise FormatError(
                f"{checkpoint.folder}: {info.name} is {list(info.shape)}; GPTQ packing needs multiples of 32, "
                "export to GGUF instead"
            )


def notes(checkpoint: Checkpoint, grid: IntGrid) -> list[str]:
    """What a user should know about the checkpoint before it is made: the tensors whose last group is short.

    Raises FormatError when a shape cannot be packed.
    """
    check_packable(checkpoint)
    short: dict[int, list[str]] = {}
    for info in checkpoint.spec.tensors():
        if info.role == "linear" and grid.group_size > 0 and info.shape[1] % grid.group_size:
            short.setdefault(info.shape[1], []).append(info.name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {k} inputs, so the last group has "
        f"{k % grid.group_size} instead of {grid.group_size} columns; GPTQModel reads that (backends torch and "
        f"triton), vLLM, ExLlama and Marlin do not: --group-size {_whole_group(k, grid.group_size)} divides"
        for k, names in short.items()
    ]


def _whole_group(k: int, below: int) -> int:
    """The largest group size under `below` that divides `k`, a multiple of 32."""
    return max(size for size in GROUP_SIZES if 0 < size < below and k % size == 0)


def _embedding(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.spec.names.embedding}.weight"


def _stem(info: TensorInfo) -> str:
    return info.name.removesuffix("weight")


def _plan(checkpoint: Checkpoint, grid: IntGrid, tied_head: bool) -> Iterator[Planned]:
    """Every tensor of the output in the order of the model."""
    for info in checkpoint.spec.tensors():
        yield from _stored(checkpoint, info, grid)
    if checkpoint.spec.tie_word_embeddings and tied_head:
        yield _tied_head(checkpoint)


def _stored(checkpoint: Checkpoint, info: TensorInfo, grid: IntGrid) -> list[Planned]:
    """What is written for a tensor of the checkpoint."""
    if info.role != "linear":
        return [Planned(info.name, checkpoint.source.dtype(info.name), info.shape)]
    n, k = info.shape
    groups, stem = grid.n_groups(k), _stem(info)
    return [
        Planned(f"{stem}qweight", "I32", (k * grid.bits // 32, n)),
        Planned(f"{stem}qzeros", "I32", (groups, n * grid.bits // 32)),
        Planned(f"{stem}scales", "F16", (groups, n)),
        Planned(f"{stem}g_idx", "I32", (k,)),
    ]


def _types(checkpoint: Checkpoint, grid: IntGrid, tied_head: bool) -> dict[str, str]:
    """How each tensor is stored: on the grid, or as the checkpoint has it."""
    heads = [_tied_head(checkpoint)] if checkpoint.spec.tie_word_embeddings and tied_head else []
    return {
        info.name: grid.name if info.role == "linear" else checkpoint.source.dtype(info.name)
        for info in checkpoint.spec.tensors()
    } | {head.name: head.dtype for head in heads}


def _tied_head(checkpoint: Checkpoint) -> Planned:
    spec = checkpoint.spec
    dtype = checkpoint.source.dtype(_embedding(checkpoint))
    return Planned(f"{HEAD}.weight", dtype, (spec.vocab_size, spec.hidden_size))


def stored_tensors(checkpoint: Checkpoint, grid: IntGrid, tied_head: bool = True) -> list[StoredTensor]:
    """What `export_gptq` would write, experts of a kind as one entry. Raises FormatError as it does."""
    check_packable(checkpoint)
    found: dict[str, StoredTensor] = {}
    for info in checkpoint.spec.tensors():
        parts = _stored(checkpoint, info, grid)
        quantized = info.role == "linear"
        name = info.name if info.expert < 0 else info.name.replace(f".experts.{info.expert}.", ".experts.*.")
        before = found.get(name)
        found[name] = StoredTensor(
            TensorInfo(name, info.shape, info.role, info.layer),
            grid.name if quantized else parts[0].dtype,
            sum(part.nbytes for part in parts) + (before.nbytes if before else 0),
            quantized,
            before.count + 1 if before else 1,
        )
    if checkpoint.spec.tie_word_embeddings and tied_head:
        head = _tied_head(checkpoint)
        found[head.name] = StoredTensor(
            TensorInfo(head.name, head.shape, "head"), head.dtype, head.nbytes, False
        )
    return list(found.values())


def _copy(checkpoint: Checkpoint, name: str, target: str, out: ShardSet) -> None:
    """Copy a tensor as it is stored, in pieces, checking that it is finite."""
    out.writer(target).write_rows(target, checkpoint.source.raw_chunks(name))


def _copy_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Tokenizer files and the like."""
    code = (CODE,) if "auto_map" in checkpoint.spec.config else ()
    copy_side_files(checkpoint.folder, folder, (*SIDE_FILES, *code), leave_out=NOT_COPIED)


def _write_configs(checkpoint: Checkpoint, folder: Path, config: dict[str, Any]) -> None:
    model = config_for_all_readers(checkpoint.spec)
    model["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(model, indent=2) + "\n", encoding="utf-8")
    (folder / "quantize_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _reasons(checkpoint: Checkpoint) -> dict[str, str]:
    """Why each tensor that is not a linear layer stays in full precision."""
    reasons = {
        "embedding": "the GPTQ format has no quantized embedding",
        "head": "readers expect the head in full precision",
        "norm": "a vector: its bytes do not count",
        "bias": "a vector: its bytes do not count",
        "router": "it decides which experts run; readers expect full precision",
    }
    return {info.name: reasons[info.role] for info in checkpoint.spec.tensors() if info.role in reasons}
