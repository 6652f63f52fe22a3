"""Fixtures shared by all tests: tiny checkpoints made on the spot, and the bundled reference model."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_quant.byte_level import spelling_to_bytes
from qwen_quant.checkpoint import resolve_model
from qwen_quant.safetensors import Planned, SafetensorsWriter, f32_to_bf16
from qwen_quant.spec import ModelSpec
from qwen_quant.tokenizer import Tokenizer

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several workers would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    "bos_token_id": 0,
}


# As the released config.json, smaller; room for the bundled vocabulary and the 208 special tokens.
TINY_QWEN1 = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "fp16": False,
    "fp32": False,
    "hidden_size": 64,
    "intermediate_size": 192,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 512,
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 256,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 4304,
}


def write_random_checkpoint(folder: Path, config: dict, seed: int = 0, shards: int = 1) -> Path:
    """A checkpoint of random BF16 weights, scaled so that activations stay tame."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    infos = ModelSpec.from_config(config).tensors()
    names = ["model.safetensors"]
    if shards > 1:
        names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    placed = {info.name: names[i * shards // len(infos)] for i, info in enumerate(infos)}
    for name in names:
        mine = [info for info in infos if placed[info.name] == name]
        with SafetensorsWriter(folder / name, [Planned(i.name, "BF16", i.shape) for i in mine]) as writer:
            for info in mine:
                noise = rng.standard_normal(info.shape).astype(np.float32)
                if info.role == "norm":
                    values = 1 + 0.1 * noise
                elif info.role == "bias":
                    values = 0.5 * noise
                elif info.role == "linear":
                    values = noise / np.sqrt(info.shape[1])
                else:
                    values = 0.5 * noise
                writer.write(info.name, f32_to_bf16(values))
    if shards > 1:
        index = {"metadata": {}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    """write_checkpoint(folder, seed=…, shards=…): as `make_checkpoint`, in a folder of the caller's."""

    def write(folder: Path, seed: int = 0, shards: int = 1, **changes: object) -> Path:
        return write_random_checkpoint(folder, {**TINY, **changes}, seed, shards)

    return write


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a random tiny checkpoint; keyword arguments override its config."""

    def make(seed: int = 0, shards: int = 1, name: str = "model", **changes: object) -> Path:
        return write_random_checkpoint(tmp_path / name, {**TINY, **changes}, seed, shards)

    return make


@pytest.fixture(scope="session")
def qwen1_config() -> dict:
    """The config.json of a tiny Qwen (1)."""
    return dict(TINY_QWEN1)


@pytest.fixture(scope="session")
def qwen1_ranks(reference: Path) -> dict[bytes, int]:
    """The bundled vocabulary as what a `qwen.tiktoken` holds: bytes and ranks."""
    vocab = json.loads((reference / "tokenizer.json").read_text())["model"]["vocab"]
    return {spelling_to_bytes(spelling): rank for spelling, rank in vocab.items()}


@pytest.fixture(scope="session")
def write_qwen1(qwen1_ranks: dict[bytes, int]) -> Callable[..., Path]:
    """write_qwen1(folder, seed=…): a random tiny Qwen (1) chat model with its tokenizer's files."""

    def write(folder: Path, seed: int = 0, **changes: object) -> Path:
        write_random_checkpoint(folder, {**TINY_QWEN1, **changes}, seed)
        lines = (b64encode(token) + b" %d\n" % rank for token, rank in qwen1_ranks.items())
        (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
        tokenizer = {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        generation = {"chat_format": "chatml", "eos_token_id": 4091, "pad_token_id": 4091}
        (folder / "generation_config.json").write_text(json.dumps(generation))
        return folder

    return write


@pytest.fixture
def make_qwen1(tmp_path: Path, write_qwen1: Callable[..., Path]) -> Callable[..., Path]:
    """As `write_qwen1`, in a folder of this test; keyword arguments override the config."""

    def make(name: str = "qwen1", **changes: object) -> Path:
        return write_qwen1(tmp_path / name, **changes)

    return make


@pytest.fixture(scope="session", autouse=True)
def interrupts_reach_children() -> None:
    """A shell starts its background jobs with SIGINT ignored, and processes inherit that; undo it for ours."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def reference() -> Path:
    """The bundled reference checkpoint."""
    return resolve_model("reference")


@pytest.fixture(scope="session")
def with_template(
    reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Tokenizer, Any]]:
    """with_template(text): the bundled tokenizer with another chat template, as we and as transformers read it."""
    from transformers import AutoTokenizer

    @functools.cache
    def make(template: str) -> tuple[Tokenizer, Any]:
        folder = tmp_path_factory.mktemp("template")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(reference / name, folder / name)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)

    return make


@pytest.fixture(scope="session")
def featured(with_template: Callable[[str], tuple[Tokenizer, Any]]) -> tuple[Tokenizer, Any]:
    """The bundled tokenizer with a template that uses much of Jinja."""
    path = Path(__file__).parent / "data" / "chat_template.jinja"
    return with_template(path.read_text(encoding="utf-8"))
