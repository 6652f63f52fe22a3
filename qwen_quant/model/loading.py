"""Filling the reference model from a checkpoint, whole or one layer at a time."""

from __future__ import annotations

import torch
from torch import nn

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.model.transformer import DecoderLayer, Model

HEAD = "lm_head.weight"


def fill(module: nn.Module, checkpoint: Checkpoint, prefix: str, device: torch.device | str) -> None:
    """Give a meta-device module its float32 parameters `prefix` + name from the checkpoint."""
    values = {
        name: torch.from_numpy(checkpoint.read(prefix + name)).to(device) for name in module.state_dict()
    }
    module.load_state_dict(values, assign=True)


def load_layer(checkpoint: Checkpoint, layer: int, device: torch.device | str = "cpu") -> DecoderLayer:
    """Decoder layer `layer` in float32."""
    with torch.device("meta"):
        module = DecoderLayer(checkpoint.spec, layer)
    fill(module, checkpoint, f"model.layers.{layer}.", device)
    return module.requires_grad_(False)


def load_model(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> Model:
    """The whole model in float32: for models that fit in memory (evaluation, tests)."""
    with torch.device("meta"):
        model = Model(checkpoint.spec)
    model.rotary = type(model.rotary)(checkpoint.spec).to(device)
    fill(model, checkpoint, "", device)
    return model.requires_grad_(False).eval()
