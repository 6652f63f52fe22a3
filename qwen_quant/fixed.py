"""Keys of a config.json that change the arithmetic of other models, or of experiments with the same code, and that
are fixed here to what every released Qwen computes.

Other keys are not looked at: files hold much that concerns training only, or the program that wrote them.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from qwen_quant.config import ConfigReader
from qwen_quant.errors import ConfigError

FIXED: dict[str, Any] = {
    # positions: in several dimensions for pictures, counted from a window on, or none in some layers
    "alibi": False,
    "no_rope_layers": None,
    "rotary_pct": 1.0,
    "use_alibi": False,
    "use_dynamic_ntk": False,
    "use_logn_attn": False,
    "use_mrope": False,
    "use_rerope": False,
    # attention: to later tokens (embedding models), to pieces of the text, with a gate or other scores
    "attention_chunk_size": None,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "attn_output_gate": False,
    "full_attention_interval": None,
    "is_causal": True,
    "query_pre_attn_scalar": None,
    "sliding_window_pattern": None,
    "use_bidirectional_attention": False,
    # scales of embeddings, residuals and logits
    "embedding_multiplier": 1.0,
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "scale_depth": None,
    "scale_emb": 1.0,
    # the feed-forward part: biases, other layers with experts, other weights of experts
    "first_k_dense_replace": 0,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_shared_experts": 0,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "shared_expert_layers": None,
    "topk_group": 1,
    "use_routing_bias": False,
}
_POSITIONS = ("rope_", "mrope_")  # whatever else begins like this is a setting of positions too
_READ = ("rope_theta", "rope_scaling", "rope_parameters")


def check_fixed(get: ConfigReader, fixed: Mapping[str, Any], family: str) -> None:
    """Raise ConfigError for a key of `fixed` with another value, naming the key and the `family` it is wrong for.

    null, and where nothing is meant (None, False, 0) every other nothing, is the same as a missing key.
    """
    for key, value in {**dict.fromkeys(_other_positions(get)), **fixed}.items():
        stated = get.config.get(key)
        if stated is None or stated == value or not (value or stated):
            continue
        remedy = f"it must be {value!r}" if value else "remove it if it has no effect"
        raise ConfigError(
            f"{get.where}: {key} is {reprlib.repr(stated)}, which is not supported for {family}; {remedy}"
        )


def _other_positions(get: ConfigReader) -> Iterator[str]:
    return (key for key in get.config if key.startswith(_POSITIONS) and key not in _READ)
