"""The reference model in torch: the arithmetic that every quantized artifact is measured against."""

from qwen_quant.model.cache import KVCache
from qwen_quant.model.loading import load_expert, load_layer, load_model, new_layer, new_rotary
from qwen_quant.model.transformer import DecoderLayer, Model, Rotary

__all__ = [
    "DecoderLayer",
    "KVCache",
    "Model",
    "Rotary",
    "load_expert",
    "load_layer",
    "load_model",
    "new_layer",
    "new_rotary",
]
