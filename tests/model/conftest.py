"""The oracle: transformers' models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}


def build(config: dict[str, Any], attention: str = "eager", seed: int = 0) -> PreTrainedModel:
    """transformers' FP32 model of `config` with weights that leave no parameter at its default."""
    arguments = dict(config)
    config_class, model_class = CLASSES[arguments.pop("model_type")]
    torch.manual_seed(seed)
    model = model_class(config_class(**arguments, attn_implementation=attention)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


@pytest.fixture(scope="session")
def build_oracle() -> Callable[..., PreTrainedModel]:
    """`build`: keyword arguments of a config (with `model_type`), the attention implementation and a seed."""
    return build
