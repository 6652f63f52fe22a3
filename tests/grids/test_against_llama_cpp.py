"""For the same importances our searches leave no more error than llama.cpp's, on every type of its files."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from helpers.ggml import quantize_chunk

from qwen_quant.grids.gguf import GRIDS, gguf_grid


@pytest.mark.parametrize("tails", [3, 30])
@pytest.mark.parametrize("name", GRIDS)
def test_weighted_errors(name: str, tails: int) -> None:
    rng, grid = np.random.default_rng(tails), gguf_grid(name)
    w = (rng.standard_t(tails, (64, 512)) * 0.02).astype(np.float32)
    importance = rng.lognormal(0.0, 1.0, 512).astype(np.float32)

    def error(values: np.ndarray) -> float:
        return float((importance * np.square(w - values)).sum())

    theirs = gguf.quants.dequantize(quantize_chunk(name, w, importance), gguf.GGMLQuantizationType[name])
    assert error(grid.searched_rounding(w, importance).decode()) <= error(theirs)
