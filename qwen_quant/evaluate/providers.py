"""Where logits come from: the torch reference model for checkpoint folders, a Session for GGUF and ONNX."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from qwen_quant.checkpoint import resolve_model
from qwen_quant.errors import FormatError, QwenQuantError, UsageError
from qwen_quant.runtime.onnx import is_onnx_folder

if TYPE_CHECKING:
    from qwen_quant.tokenizer import Tokenizer

Tokens = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]

CACHE_TYPES = ("f16", "int8", "int4", "auto")  # of the engine


class LogitsProvider(Protocol):
    """A model that is measured; `name` is how messages call it."""

    name: str

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that comes with the model."""

    @property
    def n_vocab(self) -> int:
        """V: rows of the head, padding included."""

    @property
    def max_ctx(self) -> int:
        """Tokens that the longest window may have."""

    @property
    def kv_bytes_per_token(self) -> float | None:
        """What a token adds to the cache of keys and values; None where there is no cache."""

    @property
    def kv_recent_bytes(self) -> int | None:
        """What the cache has beside that, whatever the context; None where there is no cache."""

    def window_logits(self, tokens: Tokens, first: int = 0) -> Logits:
        """Logits [T - first, V] after tokens first … T - 1 of `tokens` [T], nothing preceding the window."""


class EngineProvider:
    """A GGUF file run by the C++ engine, or an ONNX folder by onnxruntime."""

    def __init__(
        self, path: Path, n_threads: int | None = None, isa: str = "auto", kv_cache: str | None = None
    ) -> None:
        from qwen_quant.runtime.session import Session

        if kv_cache not in (None, *CACHE_TYPES):
            raise UsageError(
                f"--kv-cache {kv_cache}: a GGUF file runs with {', '.join(CACHE_TYPES)}; other layouts are "
                "measured on a checkpoint folder"
            )
        self.name = str(path)
        kind = kv_cache or "f16"
        self.session = Session.open(path, n_threads=n_threads, isa=isa, cache_type_k=kind, cache_type_v=kind)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.session.tokenizer

    @property
    def n_vocab(self) -> int:
        return self.session.n_vocab

    @property
    def max_ctx(self) -> int:
        return self.session.n_ctx

    @property
    def kv_bytes_per_token(self) -> float | None:
        return self.session.engine.kv_bytes_per_token

    @property
    def kv_recent_bytes(self) -> int | None:
        return self.session.engine.kv_recent_bytes

    def window_logits(self, tokens: Tokens, first: int = 0) -> Logits:
        return self.session.logits(tokens, first)


def open_provider(
    model: str | os.PathLike[str],
    n_threads: int | None = None,
    isa: str = "auto",
    kv_cache: str | None = None,
) -> LogitsProvider:
    """Open MODEL for measuring: a folder (full precision, GPTQ or ONNX), a GGUF file, a hub id or `reference`.

    `kv_cache` is what its keys and values go through: f16, int8, int4 or auto; for a folder also kivi4, qwen1 or a
    file of `qwen-quant kv`. None is a file's F16 cache, and none at all for a folder.
    Raises QwenQuantError when MODEL cannot be read, or needs torch and torch is not installed.
    """
    path = resolve_model(os.fspath(model))
    if is_onnx_folder(path):
        return EngineProvider(path, n_threads, kv_cache=kv_cache)
    if path.is_dir():
        try:
            from qwen_quant.evaluate.torch_provider import TorchProvider
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise QwenQuantError(
                f"{path}: a checkpoint folder is evaluated with torch, which is not installed; "
                "pip install 'qwen-quant[quantize]', or compare GGUF files"
            ) from None
        return TorchProvider(path, n_threads, kv_cache)
    if path.suffix == ".gguf":
        return EngineProvider(path, n_threads, isa, kv_cache)
    raise FormatError(f"{path}: cannot be evaluated; give a checkpoint folder or a .gguf file")
