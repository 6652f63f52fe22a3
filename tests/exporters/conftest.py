"""Tiny checkpoints with the bundled tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_quant.checkpoint import Checkpoint


@pytest.fixture
def make_model(make_checkpoint: Callable[..., Path], reference: Path) -> Callable[..., Checkpoint]:
    """A function that writes and opens a random tiny checkpoint; keyword arguments override its config."""

    def make(**changes: Any) -> Checkpoint:
        folder = make_checkpoint(**{"vocab_size": 4112, **changes})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(reference / name, folder / name)
        return Checkpoint(folder)

    return make
