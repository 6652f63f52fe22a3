"""GGUF files: metadata and decoded tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qwen_quant import _core
from qwen_quant.errors import FormatError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qwen_quant.tokenizer import Tokenizer

TOKENS_KEY, MERGES_KEY = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
END_OF_TURN_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_OF_TURN_TOKENS = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in a GGUF file.

    `shape` has the outermost dimension first, so that a weight matrix is (N, K); `offset` counts from the
    start of the file, `nbytes` is the stored size.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Metadata(Mapping[str, Any]):
    """The keys of a GGUF file; a value is made when it is asked for, unless it is one of `known`."""

    def __init__(self, core: _core.GGUF, known: Mapping[str, Any] | None = None) -> None:
        self._core = core
        self._keys = dict.fromkeys(core.keys())
        self._values = dict(known or {})

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            self._values[key] = self._core.value(key)
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class GGUFFile:
    """A memory-mapped GGUF file, version 2 or 3, checked from end to end when it is opened, unless it is already.

    Raises FormatError when the file is missing, cut or damaged.
    """

    def __init__(self, path: str | os.PathLike[str] | _core.GGUF) -> None:
        self.core = path if isinstance(path, _core.GGUF) else _core.GGUF(path)
        self.path = self.core.path
        self.tensors = {info[0]: TensorInfo(*info) for info in self.core.tensors()}

    @cached_property
    def metadata(self) -> Metadata:
        """Keys and values; arrays are lists, bytes that are not UTF-8 are escaped as by `os.fsdecode`."""
        return Metadata(self.core)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer stored in the file."""
        from qwen_quant.tokenizer import Tokenizer

        return Tokenizer.from_gguf(Metadata(self.core, self._vocabulary), self.path)

    def end_ids(self) -> frozenset[int]:
        """Every id that ends a turn: those the metadata names, and ChatML's where the vocabulary has them.

        GGUF's own keys have room for one id each; a checkpoint may have more, which our exporter lists.
        """
        metadata = self.metadata
        ids = {metadata.get(f"tokenizer.ggml.{key}") for key in END_OF_TURN_KEYS}
        ids.update(metadata.get("qwen_quant.eos_token_ids", []))
        if TOKENS_KEY in self._vocabulary:
            tokens = self._vocabulary[TOKENS_KEY]
            ids.update(i for token in END_OF_TURN_TOKENS for i in tokens.places(token)[:1])
        return frozenset(int(i) for i in ids if i is not None)

    @cached_property
    def _vocabulary(self) -> dict[str, _core.Strings]:
        """The long lists among the metadata, in which nearly all stays unread."""
        return {
            key: _core.Strings(self.core, key) for key in (TOKENS_KEY, MERGES_KEY) if key in self.metadata
        }

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The stored bytes of a tensor, read-only and without a copy."""
        return self.core.raw(name)

    def read_tensor(self, name: str, isa: str = "auto") -> npt.NDArray[np.float32]:
        """A tensor decoded to float32 in its own shape.

        Raises FormatError when there is no such tensor, or its type is not one that the engine knows.
        """
        data = self.raw(name)
        info = self.tensors[name]
        if info.type not in _core.matmul_types():
            known = ", ".join(_core.matmul_types())
            raise FormatError(
                f"{self.path}: tensor '{name}': cannot decode {info.type}; export it with one of {known}"
            )
        count = math.prod(info.shape)
        return _core.dequantize(info.type, data, count, isa).reshape(info.shape)
