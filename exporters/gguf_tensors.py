"""What each tensor of a checkpoint becomes in a GGUF file: its name, its type, and its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import FormatError, UsageError
from qwen_quant.exporters.gguf_types import FLOAT_BYTES, Chooser, TypeOptions, fitting
from qwen_quant.grids.base import QuantizedTensor, Scales, to_fp16
from qwen_quant.grids.blocks import BLOCK
from qwen_quant.grids.gguf import GRIDS, BlockGrid, gguf_grid
from qwen_quant.grids.gptq import IntGrid
from qwen_quant.quantize.recipe import GridChoice
from qwen_quant.quantize.stored import StoredTensor
from qwen_quant.safetensors import encode_floats
from qwen_quant.spec import TensorInfo

_STORED = {"F64": "F32", "F32": "F32", "F16": "F16", "BF16": "BF16"}
_OUTER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.ln_f": "output_norm",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    # Qwen (1)
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.w1": "ffn_up",
    "mlp.w2": "ffn_gate",
    "mlp.c_proj": "ffn_down",
}


def gguf_name(info: TensorInfo) -> str:
    """llama.cpp's name of a tensor."""
    module, _, kind = info.name.rpartition(".")
    if info.layer < 0:
        return f"{_OUTER_NAMES[module]}.{kind}"
    module = module.partition(f".{info.layer}.")[2]
    return f"blk.{info.layer}.{_LAYER_NAMES[module]}.{kind}"


def stored_shape(info: TensorInfo) -> tuple[int, ...]:
    """The shape as llama.cpp has it: a shared expert's gate is a vector."""
    return info.shape[1:] if info.role == "router" and info.shape[0] == 1 else info.shape


@dataclass(frozen=True)
class Choice:
    """How one tensor is stored; `reason` says why a weight is not on the file's grid.

    The same projection of all experts is one tensor, [experts, N, K]; `members` are the checkpoint's own.
    """

    info: TensorInfo
    type: str
    reason: str = ""
    members: tuple[TensorInfo, ...] = ()

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The checkpoint's tensors whose bytes follow one another in this one."""
        return self.members or (self.info,)

    @property
    def planned(self) -> StoredTensor:
        """The tensor as a plan counts it; a stack of experts by the shape of one."""
        shape = self.stored[0].shape
        info = TensorInfo(self.info.name, shape, self.info.role, self.info.layer)
        return StoredTensor(info, self.type, self.nbytes, self.type in GRIDS, len(self.stored))

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        count = int(np.prod(self.info.shape, dtype=np.int64))
        if self.type in FLOAT_BYTES:
            return count * FLOAT_BYTES[self.type]
        grid = gguf_grid(self.type)
        return count // grid.block_size * grid.block_bytes


def grid_choice(choices: Iterable[Choice]) -> GridChoice:
    """The grid of each matrix of a file, as the quantizer asks for it."""
    grids = {
        info.name: gguf_grid(choice.type)
        for choice in choices
        if choice.type in GRIDS
        for info in choice.stored
    }
    return lambda info: grids.get(info.name)


def native_type(checkpoint: Checkpoint) -> str:
    """The GGUF type that holds a GPTQ checkpoint's integers.

    Raises FormatError when none does, with the remedy.
    """
    grid = _gptq_grid(checkpoint)
    found = {(4, True): "Q4_0", (8, True): "Q8_0", (4, False): "Q4_1"}.get((grid.bits, grid.sym))
    if found is None:
        kind = "symmetric" if grid.sym else "asymmetric"
        raise FormatError(
            f"{checkpoint.folder}: GGUF's simple types cannot hold {kind} {grid.bits}-bit integers; quantize "
            "with --bits 4 or with --bits 8 --sym, or export with --type F16"
        )
    return found


def _gptq_grid(checkpoint: Checkpoint) -> IntGrid:
    assert checkpoint.quantization is not None
    return checkpoint.quantization.grid


def choose_types(checkpoint: Checkpoint, file_type: str, options: TypeOptions) -> list[Choice]:
    """The type of every tensor in the order in which they are written: layer by layer, then those outside.

    Raises UsageError when a tied embedding is asked to have two types, FormatError when the integers of a
    GPTQ checkpoint do not fit theirs.
    """
    wanted = {options.token_embedding_type, options.output_tensor_type} - {None}
    if checkpoint.spec.tie_word_embeddings and len(wanted) == 2:
        raise UsageError(
            "--token-embedding-type and --output-tensor-type differ, but this model's embedding and "
            "head are one tensor; give the same type"
        )
    chooser = Chooser(checkpoint.spec, file_type, options)
    tensors = sorted(stacked(checkpoint.spec.tensors()), key=lambda pair: pair[0].layer < 0)
    return [_choose(checkpoint, info, members, file_type, chooser) for info, members in tensors]


def stacked(infos: Iterable[TensorInfo]) -> list[tuple[TensorInfo, tuple[TensorInfo, ...]]]:
    """The tensors of a file in order: each with no members, or a stack of experts with what it is made of."""
    experts: dict[str, list[TensorInfo]] = {}
    for info in infos:
        name = info.name if info.expert < 0 else info.name.replace(f".experts.{info.expert}.", ".experts.")
        experts.setdefault(name, []).append(info)
    return [
        (group[0], ())
        if group[0].expert < 0
        else (TensorInfo(name, (len(group), *group[0].shape), "linear", group[0].layer), tuple(group))
        for name, group in experts.items()
    ]


def _choose(
    checkpoint: Checkpoint,
    info: TensorInfo,
    members: tuple[TensorInfo, ...],
    file_type: str,
    chooser: Chooser,
) -> Choice:
    if info.role in ("norm", "bias"):
        return Choice(info, "F32", "a vector: its bytes do not count")
    if info.role == "router":
        return Choice(info, "F32", "it decides which experts run")
    name, columns = gguf_name(info), info.shape[-1]
    asked = chooser.asked(name)
    if _is_quantized(checkpoint, info, members):
        kind = asked or file_type
        if kind in GRIDS and kind != native_type(checkpoint):
            raise FormatError(
                f"{checkpoint.folder}: its integers are {_gptq_grid(checkpoint).name}, which {kind} "
                f"cannot hold; export with --type {native_type(checkpoint)}"
            )
        return Choice(info, kind, members=members)
    if asked is None and checkpoint.quantization is not None and file_type in GRIDS:
        stored = _STORED[checkpoint.source.dtype((members or (info,))[0].name)]
        return Choice(info, stored, "as the GPTQ checkpoint stores it", members)
    wanted = chooser.type_of(name, columns)
    kind = fitting(wanted, columns)
    reason = "" if asked is None else "asked for"
    if kind not in GRIDS and wanted in GRIDS:
        reason = f"{columns} columns are not a multiple of {BLOCK}"
    return Choice(info, kind, reason, members)


def _is_quantized(checkpoint: Checkpoint, info: TensorInfo, members: tuple[TensorInfo, ...]) -> bool:
    """Whether a GPTQ checkpoint has integers for a tensor."""
    found = {checkpoint.is_quantized(member.name) for member in members or (info,)}
    if len(found) == 2:
        raise FormatError(
            f"{checkpoint.folder}: {info.name}: some experts are quantized and some are not, but in GGUF they are "
            "one tensor; export with --type F16"
        )
    return found == {True}


def stored_parts(checkpoint: Checkpoint, choice: Choice) -> Iterator[np.ndarray]:
    """The bytes of a tensor straight from the checkpoint, in pieces: rounded to nearest, or repacked.

    Raises CheckpointError for values that are not finite, FormatError for those that the type cannot hold.
    """
    for info in choice.stored:
        name, where = info.name, f"{checkpoint.folder}: {info.name}"
        if checkpoint.is_quantized(name):
            tensor = checkpoint.quantized(name)
            if choice.type in GRIDS:
                yield pack_tensor(where, tensor, gguf_grid(choice.type))
            else:
                yield from rounded_parts(where, [tensor.decode()], choice.type)
        else:
            yield from rounded_parts(where, checkpoint.source.chunks(name), choice.type)


def rounded_parts(where: str, parts: Iterable[np.ndarray], type_name: str) -> Iterator[np.ndarray]:
    """Float32 rows as the stored bytes of `type_name`; grids are rounded without calibration."""
    for part in parts:
        if type_name in GRIDS:
            grid = gguf_grid(type_name)
            yield grid.pack(grid.uncalibrated(part))
        else:
            yield encode_floats(where, part, type_name)


def pack_tensor(where: str, tensor: QuantizedTensor, grid: BlockGrid) -> np.ndarray:
    """The stored bytes, uint8 [N, bytes per row], of a tensor on `grid`, or on the integer grid of a GPTQ
    checkpoint that `grid` can hold: the same codes, and each group's scale repeated for its blocks of 32.

    Raises FormatError naming `where` when `grid` cannot hold them exactly.
    """
    if isinstance(tensor.grid, IntGrid):
        tensor = _repacked(where, tensor, grid)
    if tensor.grid.name != grid.name:
        raise FormatError(f"{where}: was quantized as {tensor.grid.name}, but is {grid.name} in this file")
    if not np.isfinite(tensor.scales.scale).all() or not np.isfinite(tensor.scales.offset).all():
        raise FormatError(f"{where}: a scale is not finite; quantize the model again")
    return grid.pack(tensor)


def _repacked(where: str, tensor: QuantizedTensor, grid: BlockGrid) -> QuantizedTensor:
    source, k = tensor.grid, tensor.codes.shape[1]
    assert isinstance(source, IntGrid)
    group = source.columns_per_group(k)
    if tensor.group_index is not None:
        raise FormatError(
            f"{where}: its groups are not in order (desc_act), which GGUF cannot hold; "
            "quantize without --desc-act"
        )
    if k % BLOCK or group % BLOCK:
        raise FormatError(
            f"{where}: {k} columns in groups of {group} do not fill blocks of {BLOCK}; export with --type F16"
        )
    scale, zero = tensor.scales.scale, tensor.scales.offset  # [N, G]
    if not np.array_equal(to_fp16(scale), scale):
        raise FormatError(
            f"{where}: its scales are not FP16 values, GGUF would change them; export with --type F16"
        )
    if not source.sym:
        offset = to_fp16(-scale * zero)
    elif (zero == source.middle).all():
        offset = zero
    else:
        raise FormatError(
            f"{where}: its zeros are not all {source.middle}, but quantization_config says sym; "
            "set sym to false"
        )
    # A short last group is filled by the repetition beyond its end.
    scale, offset = (np.repeat(x, group // BLOCK, axis=1)[:, : k // BLOCK] for x in (scale, offset))
    return QuantizedTensor(grid, tensor.codes, Scales(scale, offset))
