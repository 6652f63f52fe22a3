"""Qwen (1), `QWenLMHeadModel`: its config.json, whose keys are its own, and what it does beyond its context."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qwen_quant.config import MOST_LAYERS, ConfigReader
from qwen_quant.errors import ConfigError
from qwen_quant.fixed import FIXED, check_fixed

_COMPUTED = ("use_dynamic_ntk", "use_logn_attn")  # by this family alone
_FIXED: dict[str, Any] = {
    **{key: value for key, value in FIXED.items() if key not in _COMPUTED},
    "activation": "swiglu",
    "apply_residual_connection_post_layernorm": False,
    "audio": None,
    "no_bias": True,
    "rope_scaling": None,
    "scale_attn_weights": True,
    "seq_length_expansion": 1,
    "use_cache_quantization": False,
    "visual": None,
}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Qwen1Spec:
    """How the model reads texts longer than `seq_length`, the context it was trained on (released
    modeling_qwen.py; up to `seq_length` tokens neither changes anything).

    `use_dynamic_ntk` raises the rotary base with the length of the text (NTK-aware scaling, bloc97 2023), and
    `use_logn_attn` multiplies the query of the p-th token by log(p) / log(seq_length) where that is above 1
    (Su 2021; Chiang & Cholak 2022, arXiv:2202.12172).
    """

    seq_length: int
    use_dynamic_ntk: bool
    use_logn_attn: bool

    def rope_theta(self, rope_theta: float, head_dim: int, length: int) -> float:
        """The rotary base for a text that begins with `length` tokens at once: what follows keeps that base."""
        if not self.use_dynamic_ntk or length <= self.seq_length:
            return rope_theta
        alpha = 2 ** math.ceil(math.log2(length / self.seq_length) + 1) - 1
        return float(rope_theta * alpha ** (head_dim / (head_dim - 2)))


def read_qwen1(get: ConfigReader) -> dict[str, Any]:
    """The fields of a ModelSpec, by name. Raises ConfigError naming the key for what cannot be or is not known."""
    where = get.where
    check_fixed(get, _FIXED, "Qwen (1)")
    hidden_size, heads = get.positive("hidden_size"), get.positive("num_attention_heads")
    head_dim = get.positive("kv_channels", 128)
    if head_dim * heads != hidden_size:
        raise ConfigError(
            f"{where}: kv_channels {head_dim} times num_attention_heads {heads} is not hidden_size {hidden_size}; "
            "correct them"
        )
    if head_dim % 2 or head_dim < 4:
        raise ConfigError(
            f"{where}: kv_channels is {head_dim}; rotary embeddings need an even number from 4 on"
        )
    ffn = get.positive("intermediate_size")
    if ffn % 2:
        raise ConfigError(f"{where}: intermediate_size {ffn} is odd; w1 and w2 have half of its rows each")
    dtype = next((name for flag, name in _DTYPES.items() if get.flag(flag)), "bfloat16")
    return {
        "hidden_size": hidden_size,
        "intermediate_size": ffn // 2,
        "num_hidden_layers": get.positive("num_hidden_layers", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "vocab_size": get.positive("vocab_size"),
        "max_position_embeddings": get.positive("max_position_embeddings", 8192),
        "rms_norm_eps": get.number("layer_norm_epsilon", 1e-6),
        "rope_theta": _rope_theta(get),
        "tie_word_embeddings": get.flag("tie_word_embeddings"),
        "qkv_bias": True,
        "output_bias": False,
        "qk_norm": False,
        "qwen1": _beyond_context(get),
        "torch_dtype": str(get.config.get("torch_dtype") or dtype),
    }


def _rope_theta(get: ConfigReader) -> float:
    theta = get.number("rotary_emb_base", 10000.0)
    other = get.optional_number("rope_theta")
    if other not in (None, theta):
        raise ConfigError(
            f"{get.where}: rope_theta {other:g} and rotary_emb_base {theta:g} differ; keep the right one only"
        )
    return theta


def _beyond_context(get: ConfigReader) -> Qwen1Spec:
    seq_length = get.positive("seq_length")
    if seq_length < 2:
        raise ConfigError(f"{get.where}: seq_length is {seq_length}; it must be at least 2")
    # Absent is on, as in the released configuration_qwen.py.
    on = {key: get.flag(key) if key in get.config else True for key in _COMPUTED}
    return Qwen1Spec(seq_length, **on)
