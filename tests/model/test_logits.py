"""The reference model gives the logits of transformers' models: whole, cached and in chunks."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.model import Model, load_layer, load_model

Oracle = Callable[..., Any]  # the fixture that builds a transformers model

TOLERANCE = 1e-4
FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def rope_parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Every rope type with every key it knows."""
    kind = draw(st.sampled_from(["default", "linear", "yarn"]))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from([1e4, 1e6, 777.0]))}
    if kind != "default":
        rope["factor"] = draw(st.sampled_from([1.0, 2.5, 4.0]))
    if kind == "yarn":
        optional = {
            "original_max_position_embeddings": st.sampled_from([16, 64, 4096]),
            "attention_factor": st.sampled_from([0.7, 1.0, 1.3]),
            "beta_fast": st.sampled_from([8.0, 40.0]),
            "beta_slow": st.sampled_from([0.5, 2.0]),
            "truncate": st.booleans(),
        }
        rope |= draw(st.fixed_dictionaries({}, optional=optional))
        if draw(st.booleans()):
            rope |= {"mscale": 0.8, "mscale_all_dim": 1.4}
    return rope


@st.composite
def windows(draw: st.DrawFn, layers: int) -> dict[str, Any]:
    """No window, one on the upper layers, or one on any layers; shorter or longer than the text."""
    if not draw(st.booleans()):
        return {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0}
    window = {"use_sliding_window": True, "sliding_window": draw(st.sampled_from([1, 2, 7, 18, 64]))}
    if draw(st.booleans()):
        return {**window, "max_window_layers": draw(st.integers(0, layers))}
    kinds = st.sampled_from(["full_attention", "sliding_attention"])
    return {**window, "layer_types": draw(st.lists(kinds, min_size=layers, max_size=layers))}


@st.composite
def tiny_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Keyword arguments of a Qwen2Config or Qwen3Config, with `model_type` to choose between them."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.sampled_from([8, 16, 32]))
    config: dict[str, Any] = {
        "model_type": draw(st.sampled_from(["qwen2", "qwen3"])),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * head_dim,
        "intermediate_size": draw(st.sampled_from([24, 40, 96])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.sampled_from([37, 128])),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "rope_parameters": draw(rope_parameters()),
        "max_position_embeddings": 256,
    }
    if config["model_type"] == "qwen3":
        # Qwen3 has a head size of its own, independent of hidden_size, and one flag for all attention biases.
        config["head_dim"] = head_dim
        config["hidden_size"] = draw(st.sampled_from([24, 64]))
        config["attention_bias"] = draw(st.booleans())
    return config | draw(windows(config["num_hidden_layers"]))


def saved(oracle: Any, folder: Path) -> Checkpoint:
    """The checkpoint that transformers writes for `oracle`."""
    oracle.save_pretrained(folder)
    return Checkpoint(folder)


def ours(oracle: Any) -> Model:
    """The reference model over the checkpoint that transformers writes for `oracle`."""
    with tempfile.TemporaryDirectory() as folder:
        return load_model(saved(oracle, Path(folder)))


def random_tokens(vocab_size: int, batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@FEW
@given(config=tiny_configs(), attention=st.sampled_from(["eager", "sdpa"]), seed=st.integers(0, 1000))
def test_logits_equal_transformers(
    build_oracle: Oracle, config: dict[str, Any], attention: str, seed: int
) -> None:
    oracle = build_oracle(config, attention, seed)
    tokens = random_tokens(config["vocab_size"], batch=2, length=19, seed=seed)
    with torch.no_grad():
        expected = oracle(tokens).logits
        found = ours(oracle)(tokens)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < TOLERANCE


@FEW
@given(config=tiny_configs(), cuts=st.lists(st.integers(1, 22), max_size=6), seed=st.integers(0, 1000))
def test_chunks_on_a_cache_equal_the_whole(
    build_oracle: Oracle, config: dict[str, Any], cuts: list[int], seed: int
) -> None:
    oracle = build_oracle(config, seed=seed)
    tokens = random_tokens(config["vocab_size"], batch=2, length=23, seed=seed)
    edges = sorted({0, 23, *cuts})
    model = ours(oracle)
    caches = model.new_cache()
    with torch.no_grad():
        expected = oracle(tokens).logits
        parts = [model(tokens[:, a:b], caches) for a, b in itertools.pairwise(edges)]
    assert (torch.cat(parts, dim=1) - expected).abs().max() < TOLERANCE


WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


@pytest.mark.parametrize("window", [{}, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_steps_equal_transformers_steps(
    build_oracle: Oracle, model_type: str, window: dict[str, Any]
) -> None:
    """Token by token, each side on its own cache."""
    config = {
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        **window,
        **({"head_dim": 32} if model_type == "qwen3" else {}),
    }
    oracle = build_oracle(config)
    model = ours(oracle)
    tokens = random_tokens(96, batch=1, length=24, seed=3)
    caches, past = model.new_cache(), None
    with torch.no_grad():
        for position in range(tokens.shape[1]):
            step = tokens[:, position : position + 1]
            reply = oracle(step, past_key_values=past, use_cache=True)
            past = reply.past_key_values
            assert (model(step, caches) - reply.logits).abs().max() < TOLERANCE


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
ROPES = [
    {"rope_theta": 1e4},
    {"rope_theta": 1e6},
    {"rope_theta": 777.0},
    {"rope_theta": 1e6, "rope_type": "linear", "factor": 3.0},
    {"rope_theta": 1e6, **YARN},
    {"rope_theta": 1e4, **YARN, "factor": 2.7, "beta_fast": 8.0, "attention_factor": 1.3},
    {"rope_theta": 1e6, **YARN, "truncate": False, "mscale": 0.707, "mscale_all_dim": 1.0},
]


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_tables_equal_transformers_bit_for_bit(build_oracle: Oracle, rope: dict[str, Any]) -> None:
    """At positions of 40,000 a last-bit difference of a frequency is a visible angle."""
    config = {
        "model_type": "qwen3",
        "hidden_size": 24,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "vocab_size": 37,
        "rope_parameters": {"rope_type": "default", **rope},
    }
    oracle = build_oracle(config)
    positions = torch.arange(40_000, 40_004)
    expected = oracle.model.rotary_emb(torch.zeros(1), positions[None])
    for found, table in zip(ours(oracle).rotary(40_000, 4), expected, strict=True):
        assert torch.equal(found, table[0])


@pytest.mark.parametrize(
    ("model_type", "rope"),
    [("qwen2", YARN), ("qwen3", YARN), ("qwen2", {"rope_theta": 1e6}), ("qwen3", {"rope_theta": 1e7})],
    ids=["qwen2-yarn", "qwen3-yarn", "qwen2-1e6", "qwen3-1e7"],
)
def test_logits_at_position_40_000_equal_transformers(
    build_oracle: Oracle, model_type: str, rope: dict[str, Any]
) -> None:
    """Attention at this length takes seconds: one layer shows what the tables do."""
    config = {
        "model_type": model_type,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": 37,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default", **rope},
        "max_position_embeddings": 8192 if rope is YARN else 65536,
        **({"head_dim": 16} if model_type == "qwen3" else {}),
    }
    oracle = build_oracle(config, "sdpa")
    tokens = random_tokens(37, batch=1, length=40_001, seed=1)
    model = ours(oracle)
    with torch.no_grad():
        expected = oracle(tokens, use_cache=False, logits_to_keep=4).logits
        found = model.head(model.hidden_states(tokens)[:, -4:])
    assert (found - expected).abs().max() < 1e-3


def test_a_single_layer_equals_its_place_in_the_model(build_oracle: Oracle, tmp_path: Path) -> None:
    config = {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 37,
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 1,
    }
    checkpoint = saved(build_oracle(config), tmp_path)
    model = load_model(checkpoint)
    hidden = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    table = model.rotary(0, 7)
    for index, layer in enumerate(model.model.layers):
        assert torch.equal(load_layer(checkpoint, index)(hidden, table), layer(hidden, table))


def test_the_forward_pass_is_the_composition_of_its_stages(build_oracle: Oracle, tmp_path: Path) -> None:
    """The quantizer calls the stages one by one; together they are the layer."""
    config = {
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 37,
    }
    model = load_model(saved(build_oracle(config), tmp_path))
    layer, table = model.model.layers[0], model.rotary(0, 5)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    context = layer.attend(layer.attention_input(hidden), table)
    middle = hidden + layer.self_attn.o_proj(context)
    out = middle + layer.mlp.down_proj(layer.mlp.gated(layer.mlp_input(middle)))
    assert torch.equal(out, layer(hidden, table))
