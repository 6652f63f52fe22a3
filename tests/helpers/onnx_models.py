"""Tiny models for the tests of ONNX folders, and what the reference model computes with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from helpers.onnx_graph import OnnxGraph, graph_of

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.exporters.gptq import export_gptq
from qwen_quant.grids import IntGrid
from qwen_quant.model import load_model
from qwen_quant.quantize.recipe import Recipe, linear_grid
from qwen_quant.quantize.stream import gptq_layers, plain_layers

QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": None}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {**QWEN2, "tie_word_embeddings": False},
    "qwen2-tied": QWEN2,
    "qwen3": {},
    "qwen3-untied-head64": {"head_dim": 64, "tie_word_embeddings": False},
    "qwen3-biased": {"attention_bias": True},
    "qwen3-yarn": {"rope_scaling": YARN},
    "qwen2-linear": {**QWEN2, "rope_scaling": {"type": "linear", "factor": 3.0}},
}
TOKENS = np.random.default_rng(1).integers(0, 320, 40).astype(np.int64)
Make = Callable[..., Checkpoint]
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "tie_word_embeddings": False,
}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    **EXPERTS,
}
QWEN2_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "head_dim": None,
    "shared_expert_intermediate_size": 96,
    **EXPERTS,
}
SPARSE: dict[str, dict[str, Any]] = {
    "qwen3moe": QWEN3_MOE,
    "qwen3moe-not-normalized": {**QWEN3_MOE, "norm_topk_prob": False},
    "qwen3moe-one-dense-layer": {**QWEN3_MOE, "mlp_only_layers": [0]},
    "qwen2moe": QWEN2_MOE,
    "qwen2moe-normalized": {**QWEN2_MOE, "norm_topk_prob": True},
}


def expected(checkpoint: Checkpoint, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """The reference model's logits [T, V]."""
    with torch.no_grad():
        return load_model(checkpoint)(torch.from_numpy(tokens)[None])[0].numpy()


def check_steps(folder: Path, wanted: np.ndarray, limit: float) -> None:
    """All tokens at once, in chunks, and one by one."""
    for cuts in ([40], [7, 20, 40], [30, *range(31, 41)]):
        graph, start, found = OnnxGraph(folder), 0, []
        for stop in cuts:
            found.append(graph(TOKENS[None, start:stop])[0])
            start = stop
        assert np.abs(np.concatenate(found) - wanted).max() < limit, cuts


def write_gptq(checkpoint: Checkpoint, folder: Path, *, desc_act: bool = False, **grid: Any) -> Checkpoint:
    """A GPTQ checkpoint of `checkpoint`."""
    chosen = IntGrid(**grid)
    recipe = Recipe(calibrate=desc_act, num_samples=4, seq_len=64, desc_act=desc_act)
    if desc_act:  # only a calibration orders the columns
        windows = np.random.default_rng(0).integers(0, 320, (4, 64)).astype(np.int32)
        layers = gptq_layers(checkpoint, linear_grid(chosen), windows, recipe)
    else:
        layers = plain_layers(checkpoint, linear_grid(chosen))
    export_gptq(checkpoint, layers, folder, chosen, recipe, recipe.record())
    return Checkpoint(folder)


def operators(folder: Path) -> set[str]:
    model = onnx.load(graph_of(folder), load_external_data=False)
    return {node.op_type for node in model.graph.node}
