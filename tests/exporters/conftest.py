"""Checkpoints to export."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def make_model(make_checkpoint: Callable[..., Path], reference: Path) -> Callable[..., Path]:
    """A random tiny checkpoint with the bundled tokenizer; more rows than that has tokens."""

    def make(**changes: Any) -> Path:
        folder = make_checkpoint(**{"vocab_size": 4112, **changes})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(reference / name, folder / name)
        return folder

    return make
