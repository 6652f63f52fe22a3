"""What each tensor of a checkpoint becomes in an ONNX graph: a float type, or integers in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import FormatError, UsageError
from qwen_quant.exporters.onnx_blocks import BLOCKS, block_size, stored_bits
from qwen_quant.grids.gptq import IntGrid
from qwen_quant.quantize.stored import StoredTensor
from qwen_quant.spec import TensorInfo

FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
INTEGERS = {"INT4": 4, "INT8": 8}
TYPES = (*FLOAT_BYTES, "int4", "int8")
FALLBACK = "F16"
# Embedding and head by bits: every token reads all of the head, so that in int4 files it counts as several layers.
# Small blocks lose less there, and cost little.
OUTER_GRIDS = {4: IntGrid(4, 32), 8: IntGrid(8, 128)}


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
        return n * (blocks * (block * bits // 8 + FLOAT_BYTES["F16"]) + zeros)


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


def native_type(checkpoint: Checkpoint) -> str:
    """The type that holds a GPTQ checkpoint's integers; F16 for a checkpoint that has none."""
    if checkpoint.quantization is None:
        return "F16"
    return f"int{stored_bits(checkpoint.quantization.grid)}"


def choose_types(
    checkpoint: Checkpoint,
    file_type: str,
    grid: IntGrid | None,
    outer_type: str,
    token_embedding_type: str | None = None,
    output_tensor_type: str | None = None,
) -> dict[str, Choice]:
    """The type of every tensor by name; embedding and head of a file of integers are `outer_type` unless said.

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
        _outer(info, file_type, wanted.get(info.role) or (file_type if grid is None else outer_type))
        if info.role in wanted
        else _choose(checkpoint, info, file_type, grid)
        for info in checkpoint.spec.tensors()
    )
    return {choice.info.name: choice for choice in choices}


def _choose(checkpoint: Checkpoint, info: TensorInfo, file_type: str, grid: IntGrid | None) -> Choice:
    if info.role in ("norm", "bias"):
        return Choice(info, "F32", reason="a vector: its bytes do not count")
    if info.role == "router":
        return Choice(info, "F32", reason="it decides which experts run")
    if grid is None:
        return Choice(info, file_type)
    if checkpoint.quantization is None:
        return Choice(info, file_type, grid)
    if checkpoint.is_quantized(info.name):
        return Choice(info, file_type, checkpoint.quantization.grid)
    stored = checkpoint.source.dtype(info.name)
    kind = stored if stored in FLOAT_BYTES else "F32"
    return Choice(info, kind, reason="as the GPTQ checkpoint stores it")


def _outer(info: TensorInfo, file_type: str, kind: str) -> Choice:
    """Embedding and head."""
    reason = "" if kind == file_type else "embedding and head have a type of their own"
    bits = INTEGERS.get(kind.upper())
    if bits is None:
        return Choice(info, kind, reason=reason)
    largest = OUTER_GRIDS[bits].group_size
    block = next((size for size in BLOCKS if size <= largest and info.shape[1] % size == 0), None)
    if block is None:
        why = f"{info.shape[1]} columns are not a multiple of {BLOCKS[-1]}"
        return Choice(info, FALLBACK, reason=why)
    return Choice(info, kind, IntGrid(bits, block), reason)
