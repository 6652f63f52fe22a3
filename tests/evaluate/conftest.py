"""Small models with a real tokenizer, and providers whose logits a test chooses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from qwen_quant.tokenizer import Tokenizer


@pytest.fixture
def make_model(make_checkpoint: Callable[..., Path], reference: Path) -> Callable[..., Path]:
    """A function that writes a random checkpoint with the bundled tokenizer; rows beyond it are padding."""

    def make(seed: int = 0, name: str = "model", **changes: object) -> Path:
        folder = make_checkpoint(seed=seed, name=name, **{"vocab_size": 4112, **changes})
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(reference / file, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tokenizer(reference: Path) -> Tokenizer:
    return Tokenizer.from_folder(reference)


@dataclass
class FixedLogits:
    """A provider that gives row `t` of `rows` after token `t`, whatever came before."""

    rows: np.ndarray  # [V, V]
    max_ctx: int = 64
    name: str = "fixed"
    windows: list[np.ndarray] = field(default_factory=list)

    @property
    def n_vocab(self) -> int:
        return self.rows.shape[1]

    @property
    def tokenizer(self) -> Tokenizer:
        raise AssertionError("tokens are given")

    def window_logits(self, tokens: np.ndarray, first: int = 0) -> np.ndarray:
        self.windows.append(tokens)
        return self.rows[tokens[first:]].astype(np.float32)


@pytest.fixture
def fixed_logits() -> Callable[..., FixedLogits]:
    """fixed_logits(rows, …): the class, for tests to build."""
    return FixedLogits
