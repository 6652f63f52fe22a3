"""What a config.json says about sliding windows: how wide they are, and which layers have one."""

from __future__ import annotations

from qwen_quant.config import ConfigReader
from qwen_quant.errors import ConfigError

FULL, SLIDING = "full_attention", "sliding_attention"
DEFAULT_WINDOW = 4096  # of a config.json that uses a window without giving its size


def read_window(get: ConfigReader, layers: int, model_type: str) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window and the layers that have it. As in transformers: `layer_types` says which, or else all
    from `max_window_layers` on; for Qwen2-MoE every other one before it, and Qwen3-MoE knows only all or none."""
    used = get.flag("use_sliding_window")
    types = get.names("layer_types") if model_type != "qwen3_moe" else []
    unknown = sorted(set(types) - {FULL, SLIDING})
    if unknown:
        raise ConfigError(f"{get.where}: layer_types has {unknown}; known are {FULL!r} and {SLIDING!r}")
    if types and len(types) != layers:
        raise ConfigError(f"{get.where}: layer_types has {len(types)} entries for {layers} layers")
    stated = get.config.get("sliding_window", DEFAULT_WINDOW) is not None
    sliding: tuple[int, ...] = ()
    if types:
        sliding = tuple(layer for layer, name in enumerate(types) if name == SLIDING)
    elif used and stated and model_type == "qwen3_moe":
        sliding = tuple(range(layers))
    elif used and stated and model_type == "qwen2_moe":
        sliding = tuple(range(0, min(_max_window_layers(get), layers), 2))
    elif used and stated:
        sliding = tuple(range(_max_window_layers(get), layers))
    if not sliding:
        return None, ()
    if not (used and stated):
        raise ConfigError(
            f"{get.where}: layer_types has {SLIDING!r}, but use_sliding_window is not true or sliding_window "
            "is null; correct one of them"
        )
    return get.positive("sliding_window", DEFAULT_WINDOW), sliding


def _max_window_layers(get: ConfigReader) -> int:
    """The first layer with a window; 0 is allowed."""
    return 0 if get.config.get("max_window_layers") == 0 else get.positive("max_window_layers", 28)
