"""Logits of checkpoint folders by the torch reference model, float32 over stored or decoded weights."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.evaluate.providers import Logits, Tokens
from qwen_quant.grids.kv_file import FILE_NAME, read_kv_file
from qwen_quant.grids.kv_layout import KVCacheSpec
from qwen_quant.model import load_model
from qwen_quant.model.kv_cache import new_quantized_cache
from qwen_quant.quantize.kv_weights import weights_layout
from qwen_quant.tokenizer import Tokenizer


class TorchProvider:
    """A Hugging Face folder, full precision or GPTQ; `kv_cache` None keeps keys and values as they are."""

    def __init__(self, folder: Path, n_threads: int | None = None, kv_cache: str | None = None) -> None:
        if n_threads:
            torch.set_num_threads(n_threads)
        self.name = str(folder)
        self.folder = folder
        checkpoint = Checkpoint(folder)
        self.model = load_model(checkpoint)
        self.kv = None if kv_cache is None else kv_cache_spec(checkpoint, kv_cache)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder)

    @property
    def n_vocab(self) -> int:
        return self.model.spec.vocab_size

    @property
    def max_ctx(self) -> int:
        """Positions of a window at most: beside the trained length the extended one, where the config has one."""
        spec = self.model.spec
        return max(spec.max_position_embeddings, spec.context_length)

    @property
    def kv_bytes_per_token(self) -> float | None:
        spec = self.model.spec
        return None if self.kv is None else self.kv.bytes_per_token(spec.num_key_value_heads, spec.head_dim)

    @property
    def kv_recent_bytes(self) -> int | None:
        spec = self.model.spec
        return None if self.kv is None else self.kv.recent_bytes(spec.num_key_value_heads, spec.head_dim)

    @torch.inference_mode()
    def window_logits(self, tokens: Tokens, first: int = 0) -> Logits:
        ids = torch.from_numpy(tokens).long()[None]  # [1, T]
        caches = None if self.kv is None else new_quantized_cache(self.kv)
        hidden = self.model.hidden_states(ids, caches)[0, first:]  # [T - first, hidden]
        logits: Logits = self.model.head(hidden).numpy()
        return logits


def kv_cache_spec(checkpoint: Checkpoint, name: str) -> KVCacheSpec:
    """The layout that `--kv-cache` names: of NAMES, `auto` for the checkpoint folder's own, or a file's.

    As in the engine, int8 and int4 use the changes of basis of a layout that the folder holds.

    Raises UsageError for an unknown name, FormatError when the file is missing or of another model.
    """
    spec, stored = checkpoint.spec, checkpoint.folder / FILE_NAME
    if name == "auto" or (name in ("int8", "int4") and stored.is_file()) or Path(name).is_file():
        path = Path(name) if Path(name).is_file() else stored
        found, _ = read_kv_file(path, spec.num_hidden_layers, spec.num_key_value_heads, spec.head_dim)
        return found if name not in ("int8", "int4") else found.with_bits(int(name[3:]))
    return weights_layout(checkpoint, name)
