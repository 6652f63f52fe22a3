"""Filling the reference model from a checkpoint, whole or one layer at a time."""

from __future__ import annotations

import torch
from torch import nn

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.model.qwen1 import Qwen1Layer, Qwen1Model, Qwen1Rotary
from qwen_quant.model.transformer import DecoderLayer, Model, Rotary
from qwen_quant.spec import ModelSpec

EXPERTS = "mlp.experts."


def new_rotary(spec: ModelSpec) -> Rotary:
    """The rotary tables of the family."""
    return Rotary(spec) if spec.qwen1 is None else Qwen1Rotary(spec)


def new_layer(spec: ModelSpec, layer: int) -> DecoderLayer:
    """Decoder layer `layer` of the family, not filled."""
    return DecoderLayer(spec, layer) if spec.qwen1 is None else Qwen1Layer(spec)


def new_model(spec: ModelSpec) -> Model:
    """The model of the family, not filled."""
    return Model(spec) if spec.qwen1 is None else Qwen1Model(spec)


def fill(
    module: nn.Module,
    checkpoint: Checkpoint,
    prefix: str,
    device: torch.device | str,
    left_out: str | None = None,
) -> None:
    """Give a meta-device module its float32 parameters `prefix` + name from the checkpoint; those whose names
    begin with `left_out` stay on the meta device."""
    names = [name for name in module.state_dict() if left_out is None or not name.startswith(left_out)]
    values = {name: torch.from_numpy(checkpoint.read(prefix + name)).to(device) for name in names}
    module.load_state_dict(values, strict=left_out is None, assign=True)


def load_layer(
    checkpoint: Checkpoint, layer: int, device: torch.device | str = "cpu", experts: bool = True
) -> DecoderLayer:
    """Decoder layer `layer` in float32; its experts, by far the most of a sparse layer, only on demand."""
    with torch.device("meta"):
        module = new_layer(checkpoint.spec, layer)
    fill(module, checkpoint, checkpoint.spec.names.layer(layer), device, None if experts else EXPERTS)
    return module.requires_grad_(False)


def load_expert(
    module: DecoderLayer, checkpoint: Checkpoint, layer: int, expert: int, device: torch.device | str
) -> None:
    """Fill one expert of decoder layer `layer`, in float32."""
    name = f"{EXPERTS}{expert}"
    fill(module.get_submodule(name), checkpoint, f"model.layers.{layer}.{name}.", device)


def load_model(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> Model:
    """The whole model in float32: for models that fit in memory (evaluation, tests)."""
    with torch.device("meta"):
        model = new_model(checkpoint.spec)
    model.rotary = new_rotary(checkpoint.spec).to(device)
    fill(model, checkpoint, "", device)
    return model.requires_grad_(False).eval()
