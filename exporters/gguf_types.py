"""The types of a file's tensors: what the user asks for, the file's mix, and what the shapes allow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qwen_quant.errors import UsageError
from qwen_quant.exporters.gguf_mixes import ALIASES, FALLBACKS, HEAD_TYPE, MIXES, NO_GRID, Place, Rule
from qwen_quant.grids.gguf import GRIDS, gguf_grid
from qwen_quant.spec import ModelSpec

FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
TENSOR_TYPES = (*FLOAT_BYTES, *GRIDS)
_KINDS = {"attn_qkv": "attn_v", "ffn_down_exps": "ffn_down", "ffn_down_shexp": "ffn_down"}


def file_type_of(name: str) -> str:
    """The file type that `name` means, in any case. Raises UsageError when it is none that we write."""
    found = ALIASES.get(name.upper(), name.upper())
    if found not in MIXES:
        raise UsageError(f"--type {name}: not supported; choose one of {', '.join(MIXES)}")
    return found


def _check(option: str, name: str) -> None:
    """Raise UsageError when `name` is no tensor type that we write."""
    if name not in TENSOR_TYPES:
        raise UsageError(f"{option} {name}: not supported; choose one of {', '.join(TENSOR_TYPES)}")


@dataclass(frozen=True)
class TypeOptions:
    """What is asked beside the file's type, by llama-quantize's names: types for embedding and head, for tensors
    whose GGUF names contain a match of a pattern, and `pure` for no mix at all.

    `assigned` are types that a budget gave to tensors by their GGUF names, where nothing else is asked for them.
    `calibrated` tells whether the weights are fitted to activations, which moves some types. Raises UsageError for
    types that we do not write, and for what is no pattern.
    """

    token_embedding_type: str | None = None
    output_tensor_type: str | None = None
    tensor_types: tuple[tuple[str, str], ...] = ()  # pattern and type; the first that matches decides
    pure: bool = False
    calibrated: bool = False
    assigned: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.token_embedding_type is not None:
            _check("--token-embedding-type", self.token_embedding_type)
        if self.output_tensor_type is not None:
            _check("--output-tensor-type", self.output_tensor_type)
        for pattern, name in self.tensor_types:
            _check(f"--tensor-type {pattern}", name)
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(
                    f"--tensor-type {pattern}={name}: {error}; give a regular expression"
                ) from None

    @classmethod
    def parse(
        cls,
        token_embedding_type: str | None,
        output_tensor_type: str | None,
        tensor_types: Iterable[str],
        *,
        pure: bool,
        calibrated: bool,
    ) -> TypeOptions:
        """The options as a command line has them, types in any case and `tensor_types` as NAME=TYPE."""
        found = []
        for option in tensor_types:
            pattern, _, name = option.rpartition("=")
            if not (pattern and name):
                raise UsageError(f"--tensor-type {option}: must be NAME=TYPE, like ffn_down=Q6_K")
            found.append((pattern, name.upper()))
        return cls(
            token_embedding_type and token_embedding_type.upper(),
            output_tensor_type and output_tensor_type.upper(),
            tuple(found),
            pure,
            calibrated,
        )

    def manual(self, name: str) -> str | None:
        """The type that a pattern gives the tensor `name`."""
        return next(
            (kind for pattern, kind in self.tensor_types if re.search(pattern, name, re.IGNORECASE)), None
        )


NO_OPTIONS = TypeOptions()


class Chooser:
    """The types of a file's matrices, asked for in the order of the layers."""

    def __init__(self, spec: ModelSpec, file_type: str, options: TypeOptions) -> None:
        self.spec, self.options = spec, options
        self.mix = MIXES[file_type]
        self._seen = {"attn_v": 0, "ffn_down": 0}

    def asked(self, name: str) -> str | None:
        """The type that the options give the matrix with the GGUF name `name`."""
        options, embedding = self.options, name == "token_embd.weight"
        if embedding and options.token_embedding_type is not None:
            return options.token_embedding_type
        if name == "output.weight" and options.output_tensor_type is not None:
            return options.output_tensor_type
        found = options.manual(name)
        if found is None and embedding and self.spec.tie_word_embeddings:
            found = options.output_tensor_type
        return found or options.assigned.get(name)

    def type_of(self, name: str, columns: int) -> str:
        """The type of the matrix with the GGUF name `name` and rows of `columns` weights, before `fitting`."""
        found = self.asked(name)
        if found is None:
            plain = self.options.pure or self.mix.base not in GRIDS
            found = self.mix.base if plain else self._mixed(name, columns)
        return found

    def _mixed(self, name: str, columns: int) -> str:
        kind = name.removesuffix(".weight").rpartition(".")[2]
        kind = _KINDS.get(kind, kind)
        if kind == "output" or (kind == "token_embd" and self.spec.tie_word_embeddings):
            return self._head(columns)
        if kind == "attn_v":
            found = self._ruled(self.mix.attn_v, self._count(kind))
            if self._is_70b and found in ("Q3_K", "Q4_K"):
                found = "Q5_K"
            return "Q8_0" if self._experts == 8 else found
        if kind == "attn_k" and self._experts == 8:
            return "Q8_0"
        if kind == "attn_output":
            if self._experts == 8:
                return self.mix.eight or self.mix.base
            return self._ruled(self.mix.attn_output, 0)
        if kind == "ffn_down":
            # A layer of experts has several such matrices; elsewhere one with a type by pattern does not count.
            count = self._count(kind)
            return self._ruled(self.mix.ffn_down, int(name.split(".")[1]) if self._experts > 1 else count)
        return self.mix.base

    def _head(self, columns: int) -> str:
        base = self.mix.base
        return "Q8_0" if base == "Q8_0" or columns % gguf_grid(base).block_size else HEAD_TYPE

    def _ruled(self, rules: tuple[Rule, ...], index: int) -> str:
        spec = self.spec
        gqa = spec.num_attention_heads // spec.num_key_value_heads
        place = Place(index, spec.num_hidden_layers, gqa, self.options.calibrated)
        return next((kind for holds, kind in rules if holds(place)), self.mix.base)

    def _count(self, kind: str) -> int:
        """How many of a kind came before this one."""
        self._seen[kind] += 1
        return self._seen[kind] - 1

    @property
    def _experts(self) -> int:
        return 1 if self.spec.moe is None else self.spec.moe.num_experts

    @property
    def _is_70b(self) -> bool:
        """What llama.cpp takes for a Qwen2-72B: few heads' values serve many queries there."""
        return self.spec.model_type == "qwen2" and self.spec.num_hidden_layers == 80


def fitting(type_name: str, columns: int) -> str:
    """`type_name` or what stands in for it where rows of `columns` weights do not fill its blocks."""
    for kind in (type_name, FALLBACKS.get(type_name, type_name)):
        if kind not in GRIDS or columns % gguf_grid(kind).block_size == 0:
            return kind
    return NO_GRID
