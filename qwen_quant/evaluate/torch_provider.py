"""Logits of checkpoint folders by the torch reference model, float32 over stored or decoded weights."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.evaluate.providers import Logits, Tokens
from qwen_quant.model import load_model
from qwen_quant.tokenizer import Tokenizer


class TorchProvider:
    """A Hugging Face folder, full precision or GPTQ."""

    def __init__(self, folder: Path, n_threads: int | None = None) -> None:
        if n_threads:
            torch.set_num_threads(n_threads)
        self.name = str(folder)
        self.folder = folder
        self.model = load_model(Checkpoint(folder))

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

    @torch.inference_mode()
    def window_logits(self, tokens: Tokens, first: int = 0) -> Logits:
        ids = torch.from_numpy(tokens).long()[None]  # [1, T]
        hidden = self.model.hidden_states(ids)[0, first:]  # [T - first, hidden]
        logits: Logits = self.model.head(hidden).numpy()
        return logits
