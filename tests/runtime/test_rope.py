"""Context extension in the engine: against transformers, and far out against the reference model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import FormatError
from qwen_quant.exporters.gguf import export_gguf
from qwen_quant.model import load_model
from qwen_quant.model.cache import KVCache
from qwen_quant.runtime.session import Session

TinyModels = Callable[..., Any]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
TOKENS = np.random.default_rng(3).integers(0, 96, 70).astype(np.int32)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        YARN,
        {**YARN, "factor": 2.5, "original_max_position_embeddings": 64, "attention_factor": 1.3},
        {**YARN, "original_max_position_embeddings": 512, "beta_fast": 8.0, "beta_slow": 2.0},
    ],
)
def test_logits_equal_transformers(tiny_model: TinyModels, architecture: str, rope: dict[str, Any]) -> None:
    model = tiny_model(architecture, "F32", rope=rope)
    logits = Session.open(model.path).logits(TOKENS)
    difference = np.abs(logits - model.reference_logits(TOKENS))
    assert np.median(difference) < 3e-4
    assert difference.max() < 3e-3


def test_a_factor_without_a_type_is_linear(tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """As llama.cpp reads it, and the older name of the key too."""

    def older(writer: gguf.GGUFWriter, factor: float) -> None:
        writer.add_float32("qwen3.rope.scale_linear", factor)

    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_scaling_type", lambda *_: None)
    untyped = tiny_model("qwen3", "F32", rope={"rope_type": "linear", "factor": 3.5})
    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_scaling_factor", older)
    old = tiny_model("qwen3", "F32", rope={"rope_type": "linear", "factor": 4.5})
    for model in (untyped, old):
        logits = Session.open(model.path).logits(TOKENS)
        assert np.abs(logits - model.reference_logits(TOKENS)).max() < 3e-3


class HalfCache(KVCache):
    """Keys and values rounded to FP16, as the engine keeps them."""

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().append(keys.half().float(), values.half().float(), table)


@pytest.fixture
def make_model(make_checkpoint: Callable[..., Path], reference: Path) -> Callable[..., Checkpoint]:
    """A tiny random checkpoint with the bundled tokenizer."""

    def make(**changes: Any) -> Checkpoint:
        folder = make_checkpoint(**{"vocab_size": 4112, "rope_theta": 1e6, **changes})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(reference / name, folder / name)
        return Checkpoint(folder)

    return make


FAMILIES = [
    {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": None},
    {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},
]


@pytest.mark.parametrize("family", FAMILIES, ids=["qwen2", "qwen3"])
def test_greedy_text_equals_the_reference_models(
    make_model: Callable[..., Checkpoint], tmp_path: Path, family: dict[str, Any]
) -> None:
    checkpoint, path = make_model(**family, rope_scaling=YARN), tmp_path / "m.gguf"
    export_gguf(checkpoint, path, "F16")
    prompt = (TOKENS[:20]).tolist()
    found = list(Session.open(path).generate(prompt, 64, stop_ids=set()))
    model, tokens = load_model(checkpoint), prompt
    caches = [HalfCache() for _ in range(checkpoint.spec.num_hidden_layers)]
    fresh = tokens
    expected = []
    for _ in range(len(found)):
        logits = model(torch.tensor([fresh]), caches)[0, -1]
        fresh = [int(logits.argmax())]
        expected += fresh
    assert found == expected and len(found) > 32


FAR = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16384}


@pytest.mark.parametrize(
    ("rope", "position"),
    [
        ({"rope_scaling": FAR, "max_position_embeddings": 16384}, 40_000),
        ({"rope_theta": 1e7, "max_position_embeddings": 65536}, 12_000),
    ],
    ids=["yarn", "1e7"],
)
def test_logits_far_out(
    make_model: Callable[..., Checkpoint], tmp_path: Path, rope: dict[str, Any], position: int
) -> None:
    small = {"hidden_size": 32, "head_dim": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    checkpoint = make_model(**small, num_hidden_layers=1, **rope)
    path = tmp_path / "m.gguf"
    export_gguf(checkpoint, path, "F32")
    tokens = np.random.default_rng(4).integers(0, 4096, position + 1).astype(np.int32)
    model = load_model(checkpoint)
    caches: list[KVCache] = [HalfCache() for _ in range(checkpoint.spec.num_hidden_layers)]
    hidden = model.hidden_states(torch.from_numpy(tokens)[None].long(), caches)
    expected = model.head(hidden[0, -1]).numpy()
    assert np.abs(Session.open(path).prefill(tokens) - expected).max() < 1e-3


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("scaling.type", "longrope", "'longrope' is not supported"),
        ("scaling.alpha", 2.0, "is not known"),
        ("scaling.yarn_log_multiplier", 0.1, "is not known"),
        ("scaling.yarn_ext_factor", 0.5, "other values than 1"),
        ("scaling.factor", 0.5, "is out of range"),
        ("scaling.factor", float("nan"), "is out of range"),
        ("scaling.attn_factor", -1.0, "is not a positive number"),
        ("scaling.yarn_beta_slow", 64.0, "is above yarn_beta_fast"),
        ("scaling.original_context_length", 0, "is out of range"),
    ],
)
def test_unknown_scaling_is_refused_by_name(tmp_path: Path, key: str, value: Any, problem: str) -> None:
    path = tmp_path / "rope.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    if isinstance(value, str):
        writer.add_string(f"qwen2.rope.{key}", value)
    else:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"qwen2.rope.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(FormatError, match=rf"key 'qwen2\.rope\.{key}': .*{problem}"):
        Session.open(path)
