"""GPTQ checkpoints of models with an extended context or a window: every reader finds the setting it knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.exporters.gptq import export_gptq
from qwen_quant.grids import IntGrid
from qwen_quant.quantize.recipe import Recipe, linear_grid
from qwen_quant.quantize.stream import gptq_layers

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": None}
WINDOW = {**QWEN2, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
# Two chunk borders lie in the windows of 64 tokens.
CHUNKS = {"chunk_size": 32, "local_size": 8, "original_max_position_embeddings": 48}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {**YARN, "rope_theta": 5e5}, "rope_theta": None},
        {"rope_scaling": YARN, "rope_theta": 5e5},
        {**WINDOW, "rope_theta": 5e5},
        {**QWEN2, "dual_chunk_attention_config": CHUNKS, "rope_theta": 5e5},
    ],
    ids=["transformers 5", "older", "window", "dual chunk"],
)
def test_the_setting_survives(
    make_checkpoint: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    checkpoint, target = Checkpoint(make_checkpoint(**changes)), tmp_path / "out"
    grid, recipe = IntGrid(4, 32), Recipe(num_samples=2, seq_len=64)
    tokens = np.random.default_rng(0).integers(0, 320, (2, 64)).astype(np.int32)
    layers = gptq_layers(checkpoint, linear_grid(grid), tokens, recipe)
    export_gptq(checkpoint, layers, target, grid, recipe, recipe.record())
    assert Checkpoint(target).spec == checkpoint.spec
    written = json.loads((target / "config.json").read_text())
    assert written["rope_theta"] == 5e5
    config = AutoConfig.from_pretrained(target)
    assert config.rope_parameters["rope_theta"] == 5e5
    if "sliding_window" in changes:
        assert config.layer_types == ["full_attention", "sliding_attention"]
    elif "dual_chunk_attention_config" in changes:
        assert written["dual_chunk_attention_config"] == config.dual_chunk_attention_config == CHUNKS
    else:
        assert written["rope_scaling"] == YARN
        assert {key: config.rope_parameters[key] for key in YARN} == YARN
