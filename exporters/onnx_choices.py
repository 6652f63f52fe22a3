"""What each tensor of a checkpoint becomes in an ONNX graph: a float type, or integers in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import FormatError, UsageError
from qwen_quant.exporters.onnx_blocks import BLOCKS, block_size, stored_bits
from qwen_quant.grids.gptq import IntGrid
from qwen_quant.quantize.recipe import GridChoice, linear_grid
from qwen_quant.quantize.stored import StoredTensor
from qwen_quant.spec import TensorInfo

FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
INTEGERS = {"INT4": 4, "INT8": 8}
TYPES = (*FLOAT_BYTES, "int4", "int8")
FALLBACK = "F16"
# 8 bits cost little loss in the embedding and in the head, where 16 would be read as FP32 at every token.
OUTER_BITS = 8


@dataclass(frozen=True)
class Choice:
    """How one tensor is stored: as `type`, or on `grid`; `reason` says why a weight is not of the file's type."""

    info: TensorInfo
    type: str
    grid: IntGrid | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """What reports call it: `F16`, `int4-g128`."""
        return self.type if self.grid is None else self.grid.name

    @property
    def planned(self) -> StoredTensor:
        """The tensor as a plan counts it."""
        return StoredTensor(self.info, self.name, self.nbytes, self.grid is not None)

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        if self.grid is None:
            return int(np.prod(self.info.shape, dtype=np.int64)) * FLOAT_BYTES[self.type]
        n, k = self.info.shape
        bits, block = stored_bits(self.grid), block_size(self.grid, k)
        blocks = -(-k // block)
        zeros = 0 if self.grid.sym else -(-blocks * bits // 8)
        return n * (blocks * (block * bits // 8 + 4) + zeros)


def check_type(name: str, option: str = "--type") -> str:
    """`name` as we spell it. Raises UsageError when it is not a type we write."""
    found = next((known for known in TYPES if known.upper() == name.upper()), None)
    if found is None:
        raise UsageError(f"{option} {name}: not an ONNX type of ours; choose one of {', '.join(TYPES)}")
    return found


def file_grid(file_type: str, group_size: int, sym: bool) -> IntGrid | None:
    """The grid of linear layers in a file of `file_type`; None for float types."""
    bits = INTEGERS.get(file_type.upper())
    return None if bits is None else IntGrid(bits, group_size, sym)


def grid_choice(grid: IntGrid) -> GridChoice:
    """The grid of each linear layer, as the quantizer asks for it."""
    return linear_grid(grid)


def native_type(checkpoint: Checkpoint) -> str:
    """The type that holds a GPTQ checkpoint's integers; F16 for a checkpoint that has none."""
    if checkpoint.quantization is None:
        return "F16"
    return f"int{stored_bits(checkpoint.quantization.grid)}"


def choose_types(
    checkpoint: Checkpoint,
    file_type: str,
    grid: IntGrid | None,
    token_embedding_type: str | None = None,
    output_tensor_type: str | None = None,
) -> dict[str, Choice]:
    """The type of every tensor by name.

    Raises UsageError when a tied embedding is asked to have two types, FormatError when the integers of a GPTQ
    checkpoint are not of `file_type`.
    """
    native = native_type(checkpoint)
    if checkpoint.quantization is not None and grid is not None and file_type != native:
        raise FormatError(
            f"{checkpoint.folder}: its integers are {checkpoint.quantization.grid.name}, which {file_type} would "
            f"round a second time; export with --type {native} or a float type"
        )
    wanted = {"embedding": token_embedding_type, "head": output_tensor_type}
    if checkpoint.spec.tie_word_embeddings:
        if None not in wanted.values() and token_embedding_type != output_tensor_type:
            raise UsageError(
                "--token-embedding-type and --output-tensor-type differ, but this model's embedding and "
                "head are one tensor; give the same type"
            )
        wanted["embedding"] = token_embedding_type or output_tensor_type
    choices = (
        _choose(checkpoint, info, file_type, grid, wanted.get(info.role))
        for info in checkpoint.spec.tensors()
    )
    return {choice.info.name: choice for choice in choices}


def _choose(
    checkpoint: Checkpoint, info: TensorInfo, file_type: str, grid: IntGrid | None, wanted: str | None
) -> Choice:
    if info.role in ("norm", "bias"):
        return Choice(info, "F32", reason="a vector: its bytes do not count")
    if info.role == "router":
        return Choice(info, "F32", reason="it decides which experts run")
    if info.role != "linear":
        return _outer(info, file_type, grid, wanted)
    if grid is None:
        return Choice(info, file_type)
    if checkpoint.quantization is None:
        return Choice(info, file_type, grid)
    if checkpoint.is_quantized(info.name):
        return Choice(info, file_type, checkpoint.quantization.grid)
    stored = checkpoint.source.dtype(info.name)
    kind = stored if stored in FLOAT_BYTES else "F32"
    return Choice(info, kind, reason="as the GPTQ checkpoint stores it")


def _outer(info: TensorInfo, file_type: str, grid: IntGrid | None, wanted: str | None) -> Choice:
    """Embedding and head."""
    kind = wanted or (file_type if grid is None else f"int{OUTER_BITS}")
    bits = INTEGERS.get(kind.upper())
    reason = "asked for" if wanted else "embeddings and heads keep 8 bits"
    if bits is None:
        return Choice(info, kind, reason="" if kind == file_type else reason)
    block = next((size for size in BLOCKS if info.shape[1] % size == 0), None)
    if block is None:
        why = f"{info.shape[1]} columns are not a multiple of {BLOCKS[-1]}"
        return Choice(info, FALLBACK, reason=why)
    return Choice(info, kind, IntGrid(bits, block), "" if kind == file_type else reason)
