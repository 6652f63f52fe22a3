"""Qwen (1) gives the logits of transformers' Qwen2 over renamed weights within its context, and its own beyond."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import rewrite
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import CheckpointError, ConfigError
from qwen_quant.model import load_model
from qwen_quant.spec import ModelSpec

OUTER = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
LAYER = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}
FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def logn_attention(module, query, key, value, *args, **kwargs):  # type: ignore[no-untyped-def]
    """transformers' attention with the query of the p-th token (from 1) times log(p) to the base of the trained
    length, where that is above 1."""
    last = key.shape[2]
    counted = range(last - query.shape[2] + 1, last + 1)
    scales = [max(1.0, math.log(p, module.config.logn_base)) for p in counted]
    return eager_attention_forward(module, query * torch.tensor(scales)[:, None], key, value, *args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register("logn", logn_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("logn", eager_mask)


def oracle(checkpoint: Checkpoint, rope_theta: float, logn_base: int | None = None) -> Qwen2ForCausalLM:
    """transformers' Qwen2 with the checkpoint's weights under its own names; with a base also LogN attention."""
    spec, weights = checkpoint.spec, {}
    for info in spec.tensors():
        value = torch.from_numpy(checkpoint.read(info.name))
        module, _, kind = info.name.rpartition(".")
        if info.layer < 0:
            weights[f"{OUTER[module]}.{kind}"] = value
            continue
        prefix, module = f"model.layers.{info.layer}", module.split(f".{info.layer}.")[1]
        if module == "attn.c_attn":
            for name, part in zip("qkv", value.chunk(3), strict=True):
                weights[f"{prefix}.self_attn.{name}_proj.{kind}"] = part
        else:
            weights[f"{prefix}.{LAYER[module]}.{kind}"] = value
    config = Qwen2Config(
        vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_hidden_layers, num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_attention_heads, rms_norm_eps=spec.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=spec.tie_word_embeddings,
        attn_implementation="eager" if logn_base is None else "logn",
    )  # fmt: skip
    config.logn_base = logn_base
    model = Qwen2ForCausalLM(config).eval()
    if spec.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize(("length", "alpha"), [(9, 1), (16, 1), (17, 3), (32, 3), (33, 7), (70, 15)])
def test_logits_equal_qwen2_with_the_stretched_base(
    make_qwen1: Callable[..., Path], length: int, alpha: int
) -> None:
    checkpoint = Checkpoint(make_qwen1(seq_length=16, use_logn_attn=False))
    tokens = torch.randint(4000, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        expected = oracle(checkpoint, 10000.0 * alpha ** (16 / 14))(tokens).logits
        assert (load_model(checkpoint)(tokens) - expected).abs().max() < 1e-4


@st.composite
def tiny_configs(draw: st.DrawFn) -> dict[str, Any]:
    """What a config.json may say in more than one way."""
    heads, head_dim = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([4, 8, 16]))
    return {
        "num_attention_heads": heads,
        "kv_channels": head_dim,
        "hidden_size": heads * head_dim,
        "intermediate_size": 2 * draw(st.sampled_from([12, 40])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.sampled_from([37, 128])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "rotary_emb_base": draw(st.sampled_from([10000, 1e6, 777.0])),
        "seq_length": draw(st.sampled_from([2, 5, 16, 64])),
        "use_dynamic_ntk": draw(st.booleans()),
        "use_logn_attn": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }


def expected_base(config: dict[str, Any], prompt: int) -> float:
    """The rotary base for a text that begins with `prompt` tokens."""
    stretch, head_dim = prompt / config["seq_length"], config["kv_channels"]
    if not config["use_dynamic_ntk"] or stretch <= 1:
        return float(config["rotary_emb_base"])
    alpha = 2 ** math.ceil(math.log(stretch, 2) + 1) - 1
    return float(config["rotary_emb_base"] * alpha ** (head_dim / (head_dim - 2)))


BOTH = {"seq_length": 16, "use_dynamic_ntk": True, "use_logn_attn": True, "kv_channels": 8}
BOTH |= {"num_attention_heads": 2, "hidden_size": 16, "rotary_emb_base": 10000}


@FEW
@given(
    config=tiny_configs(), cuts=st.lists(st.integers(1, 39), min_size=1, max_size=4), seed=st.integers(0, 99)
)
@example(config=BOTH, cuts=[40], seed=0)  # all at once
@example(config=BOTH, cuts=[33, 39], seed=0)  # an own base, and the cache goes on with it
@example(config=BOTH, cuts=[7, 30], seed=0)  # within the context first: the trained base remains
def test_every_setting_equals_qwen2_with_its_base_and_scales(
    write_checkpoint: Callable[..., Path],
    qwen1_config: dict,
    config: dict[str, Any],
    cuts: list[int],
    seed: int,
) -> None:
    """Whole and in chunks: the base is that of what is read first, LogN counts from the beginning of the text."""
    edges = sorted({0, 40, *cuts})
    qwen3_keys = {"rope_theta": None, "head_dim": None, "max_position_embeddings": 64}
    with tempfile.TemporaryDirectory() as folder:
        written = {**qwen1_config, **qwen3_keys, **config}
        checkpoint = Checkpoint(write_checkpoint(Path(folder) / "m", seed, **written))
        base = expected_base(config, edges[1])
        reference = oracle(checkpoint, base, config["seq_length"] if config["use_logn_attn"] else None)
        model = load_model(checkpoint)
    tokens = torch.randint(37, (2, 40), generator=torch.Generator().manual_seed(seed))
    caches = model.new_cache()
    with torch.no_grad():
        parts = [model(tokens[:, a:b], caches) for a, b in itertools.pairwise(edges)]
        assert (torch.cat(parts, 1) - reference(tokens).logits).abs().max() < 1e-4


def test_chunks_within_the_context_equal_the_whole(make_qwen1: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(make_qwen1(seq_length=16, use_dynamic_ntk=False))
    model, tokens = load_model(checkpoint), torch.arange(40)[None]
    caches = model.new_cache()
    with torch.no_grad():
        parts = [model(tokens[:, :7], caches), model(tokens[:, 7:30], caches), model(tokens[:, 30:], caches)]
        assert (torch.cat(parts, 1) - model(tokens)).abs().max() < 1e-4


def test_queries_beyond_the_context_grow_with_the_logarithm(make_qwen1: Callable[..., Path]) -> None:
    from qwen_quant.model.qwen1 import query_scales

    qwen1 = Checkpoint(make_qwen1(seq_length=16)).spec.qwen1
    assert qwen1 is not None
    expected = [max(1.0, math.log(p, 16)) for p in range(11, 41)]
    found = query_scales(qwen1, 10, 30, torch.device("cpu"))
    assert torch.allclose(found, torch.tensor(expected))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"activation": "gelu"}, "activation is 'gelu'"),
        (
            {"apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm is True",
        ),
        ({"audio": {"n_layer": 32}}, "audio is {'n_layer': 32}"),
        ({"no_bias": False}, "no_bias is False"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling is {"),
        ({"rotary_pct": 0.5}, "rotary_pct is 0.5"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"seq_length_expansion": 4}, "seq_length_expansion is 4"),
        ({"use_cache_quantization": True}, "use_cache_quantization is True"),
        ({"use_mrope": True}, "use_mrope is True"),
        ({"use_rerope": True, "rerope_window": 512}, "use_rerope is True"),
        ({"visual": {"layers": 48}}, "visual is {'layers': 48}"),
        ({"kv_channels": 32}, "kv_channels 32 times num_attention_heads 4 is not hidden_size 64"),
        ({"kv_channels": 2, "num_attention_heads": 32}, "kv_channels is 2"),
        ({"intermediate_size": 191}, "intermediate_size 191 is odd"),
        ({"rope_theta": 5000.0}, "rope_theta 5000 and rotary_emb_base 10000 differ"),
        ({"seq_length": 1}, "seq_length is 1"),
        ({"seq_length": None}, "'seq_length' is missing"),
        ({"use_dynamic_ntk": "auto"}, "use_dynamic_ntk is 'auto'"),
        ({"use_logn_attn": 1}, "use_logn_attn is 1"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    qwen1_config: dict, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelSpec.from_config({**qwen1_config, **changes}, "here/config.json")
    message = str(caught.value)
    assert message.startswith("here/config.json: ") and named in message and "\n" not in message


def test_what_says_nothing_new_is_taken(qwen1_config: dict) -> None:
    """As the released files and those that others saved have it."""
    same = {"rope_theta": 10000, "use_rerope": False, "softmax_in_fp32": False, "use_cache_kernel": False}
    same |= {"rope_scaling": None, "visual": None, "use_flash_attn": True, "auto_map": {"AutoConfig": "x"}}
    assert ModelSpec.from_config({**qwen1_config, **same}) == ModelSpec.from_config(qwen1_config)
    config = {k: v for k, v in qwen1_config.items() if k not in ("use_dynamic_ntk", "use_logn_attn")}
    qwen1 = ModelSpec.from_config(config).qwen1  # both are on in the released code
    assert qwen1 is not None and qwen1.use_dynamic_ntk and qwen1.use_logn_attn


@pytest.mark.parametrize("value", [0.0, 1e-3])
def test_biases_that_are_zero_are_no_biases(make_qwen1: Callable[..., Path], value: float) -> None:
    """AutoGPTQ stores them for every layer; any other would change the model."""
    folder, extra = make_qwen1(), "transformer.h.1.mlp.w1.bias"
    rewrite(folder, {extra: np.full(96, value, np.float32)})
    if value:
        with pytest.raises(CheckpointError, match=f"tensor '{extra}' is not zero"):
            Checkpoint(folder)
    else:
        assert extra not in load_model(Checkpoint(folder)).state_dict()
