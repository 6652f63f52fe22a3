"""What the weights alone tell of a key/value cache: its centres, which are biases, and the balance of its channels.

An RMS norm leaves channels of mean square 1; taken as independent, they give what a row of a projection puts out the
mean square of its weights. That is enough to see channels that a bias, or a scale moved from queries to keys, has made
enormous.
"""

from __future__ import annotations

import numpy as np

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.grids.kv import Half
from qwen_quant.grids.kv_layout import KVCacheSpec, KVLayer, KVLayout, balance, uncalibrated


def key_bias(checkpoint: Checkpoint, layer: int) -> np.ndarray | None:
    """The key bias of a layer [n_kv_heads, head_dim], None without one."""
    return _bias(checkpoint, layer, 1)


def key_spread(checkpoint: Checkpoint, layer: int) -> float:
    """The expected length of what an input adds to all heads' keys."""
    return float(np.sqrt(_mean_squares(checkpoint, layer, 1).sum()))


def weights_layout(checkpoint: Checkpoint, name: str) -> KVCacheSpec:
    """The layout `name` of NAMES without calibration, as the engine has it for a file that holds none.

    Raises UsageError for another name.
    """
    layers = range(checkpoint.spec.num_hidden_layers)
    if name not in ("int8", "int4"):
        return uncalibrated(name, [None for _ in layers])
    return uncalibrated(name, [_basis(checkpoint, layer) for layer in layers])


def _basis(checkpoint: Checkpoint, layer: int) -> KVLayer:
    """Centres and balances of a layer's cache."""
    spec = checkpoint.spec
    queries, keys, values = (_mean_squares(checkpoint, layer, part) for part in range(3))
    if spec.qk_norm:
        queries, keys = (
            _normalized(checkpoint, layer, "q", queries),
            _normalized(checkpoint, layer, "k", keys),
        )
    query_bias = _bias(checkpoint, layer, 0)
    if query_bias is not None:
        queries = queries + query_bias**2
    key_balance = balance(_pair_means(_groups(queries, spec.num_key_value_heads)), _pair_means(keys))
    output = checkpoint.read(f"{spec.names.layer(layer)}{spec.names.output}.weight")
    gain = (output**2).sum(axis=0).reshape(spec.num_attention_heads, spec.head_dim)
    value_balance = balance(_groups(gain, spec.num_key_value_heads), values)
    return KVLayer(
        KVLayout(Half(), key_bias(checkpoint, layer), key_balance),
        KVLayout(Half(), _bias(checkpoint, layer, 2), value_balance),
    )


def _groups(of_queries: np.ndarray, n_kv_heads: int) -> np.ndarray:
    """[n_heads, head_dim] as means of the heads that share keys, [n_kv_heads, head_dim]."""
    means: np.ndarray = of_queries.reshape(n_kv_heads, -1, of_queries.shape[-1]).mean(axis=1)
    return means


def _pair_means(squares: np.ndarray) -> np.ndarray:
    """[heads, head_dim] where both channels that RoPE turns into one another have their mean."""
    means = squares.reshape(len(squares), 2, -1).mean(axis=1)
    return np.concatenate((means, means), axis=1)


def _mean_squares(checkpoint: Checkpoint, layer: int, part: int) -> np.ndarray:
    """Of queries (part 0), keys (1) or values (2) without bias [heads, head_dim]."""
    spec = checkpoint.spec
    norm = checkpoint.read(f"{spec.names.layer(layer)}{spec.names.attention_norm}.weight")
    squares: np.ndarray = ((_part(checkpoint, layer, part, "weight") * norm) ** 2).sum(axis=1)
    return squares.reshape(-1, spec.head_dim)


def _normalized(checkpoint: Checkpoint, layer: int, part: str, squares: np.ndarray) -> np.ndarray:
    """After the Q/K norm, which leaves heads of mean square 1 times its weights."""
    name = f"{checkpoint.spec.names.layer(layer)}self_attn.{part}_norm.weight"
    scaled: np.ndarray = squares / squares.mean(axis=1, keepdims=True) * checkpoint.read(name) ** 2
    return scaled


def _bias(checkpoint: Checkpoint, layer: int, part: int) -> np.ndarray | None:
    if not checkpoint.spec.qkv_bias:
        return None
    return _part(checkpoint, layer, part, "bias").reshape(-1, checkpoint.spec.head_dim)


def _part(checkpoint: Checkpoint, layer: int, part: int, parameter: str) -> np.ndarray:
    """The rows of queries (part 0), keys (1) or values (2) in a layer's projections: `weight` or `bias`."""
    spec = checkpoint.spec
    names, sizes = spec.names.qkv, (spec.q_size, spec.kv_size, spec.kv_size)
    value = checkpoint.read(f"{spec.names.layer(layer)}{names[part if len(names) == 3 else 0]}.{parameter}")
    first = sum(sizes[:part])
    return value if len(names) == 3 else value[first : first + sizes[part]]
