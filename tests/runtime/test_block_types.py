"""Every block type on the engine, alone and mixed as llama.cpp mixes them, against transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers.ggml import quantize_chunk

from qwen_quant import _core
from qwen_quant.checkpoint import Checkpoint
from qwen_quant.exporters.gguf import export_gguf
from qwen_quant.exporters.gguf_tensors import gguf_name
from qwen_quant.grids.gguf import GRIDS
from qwen_quant.model import load_model
from qwen_quant.runtime.session import Session

TinyModels = Callable[..., Any]
TOKENS = np.random.default_rng(3).integers(0, 96, 70).astype(np.int32)
# Rows that are whole blocks of 256.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
WIDE_EXPERTS = {"moe_intermediate_size": 256, "num_experts": 5}
# What llama.cpp's quantizer makes of a model as Q4_K_M, and where rows are no multiple of 256 as Q4_K_M and Q3_K_S.
MIXES: dict[str, dict[str, Any]] = {
    "Q4_K_M": {"types": {"attn_v": "Q6_K", "blk.0.ffn_down": "Q6_K", "token_embd": "Q6_K"}, **WIDE},
    "Q5_0 for Q4_K": {
        "types": {"attn_v": "Q8_0", "attn_output": "Q5_1", "ffn_down": "Q8_0", "token_embd": "Q8_0", "": "Q5_0"},
    },
    "IQ4_NL for Q3_K": {"types": {"attn_k": "F16", "token_embd": "Q8_0", "": "IQ4_NL"}},
    "each its own": {
        "types": {
            "attn_q": "Q2_K", "attn_k": "IQ4_XS", "attn_v": "Q5_K", "attn_output": "Q3_K", "ffn_gate": "Q5_1",
            "ffn_up": "Q4_K", "ffn_down": "Q6_K", "token_embd": "Q5_K", "output.": "Q6_K",
        },
        "tied": False,
        **WIDE,
    },
}  # fmt: skip


def log_softmax(logits: np.ndarray) -> np.ndarray:  # [T, V]
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def kld(reference: np.ndarray, logits: np.ndarray) -> float:
    """Mean over tokens of KL(softmax(reference) || softmax(logits)), both [T, V]."""
    p, q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize("isa", _core.cpu_isas())
@pytest.mark.parametrize("tensor_type", GRIDS)
def test_logits_equal_transformers(tiny_model: TinyModels, tensor_type: str, isa: str) -> None:
    """Embedding and tied head of the type too; what int8 activations cost."""
    model = tiny_model("qwen3", tensor_type, **WIDE)
    logits = Session.open(model.path, isa=isa, n_threads=2).logits(TOKENS)
    assert kld(model.reference_logits(TOKENS), logits) < 1e-3


@pytest.mark.parametrize("isa", _core.cpu_isas())
@pytest.mark.parametrize("mix", MIXES)
def test_mixed_types(tiny_model: TinyModels, mix: str, isa: str) -> None:
    model = tiny_model("qwen3", "Q4_K", **MIXES[mix])
    logits = Session.open(model.path, isa=isa, n_threads=2).logits(TOKENS)
    assert kld(model.reference_logits(TOKENS), logits) < 1e-3


@pytest.mark.parametrize("isa", _core.cpu_isas())
@pytest.mark.parametrize(
    "tensor_type", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q5_0", "Q5_1"]
)
def test_experts(tiny_model: TinyModels, tensor_type: str, isa: str) -> None:
    """The down projections are of another type than what feeds them."""
    types = {"ffn_down_exps": "Q6_K"}
    model = tiny_model("qwen3moe", tensor_type, types=types, **WIDE, **WIDE_EXPERTS)
    gaps = np.abs(
        Session.open(model.path, isa=isa, n_threads=2).logits(TOKENS) - model.reference_logits(TOKENS)
    )
    # As in test_experts.py: now and then int8 activations lead to another expert.
    assert np.median(gaps) < 0.08
    assert np.quantile(gaps.max(axis=1), 0.9) < 0.5


@pytest.mark.parametrize("isa", _core.cpu_isas())
@pytest.mark.parametrize("mix", MIXES)
def test_steps_threads_and_chunks_change_nothing(tiny_model: TinyModels, mix: str, isa: str) -> None:
    path = tiny_model("qwen3", "Q4_K", **MIXES[mix]).path
    expected = Session.open(path, isa=isa, n_threads=1).logits(TOKENS)
    other = Session.open(path, isa=isa, n_threads=3)
    np.testing.assert_array_equal(other.prefill(TOKENS[:40]), expected[39])
    for position in range(40, 60):
        np.testing.assert_array_equal(other.step(int(TOKENS[position])), expected[position])


NINE_TYPES = {
    "token_embd": "Q6_K", "output.": "Q5_K", "attn_q": "Q4_K", "attn_k": "IQ4_XS", "attn_v": "Q6_K",
    "attn_output": "IQ4_NL", "ffn_gate": "Q3_K", "ffn_up": "Q5_0", "blk.0.ffn_down": "Q2_K", "ffn_down": "Q5_1",
}  # fmt: skip


def quantized_by_llama_cpp(source: Path, target: Path, types: dict[str, str]) -> None:
    """The file with its matrices quantized by ggml, to types given by parts of their names."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "qwen3")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        values = np.asarray(tensor.data, dtype=np.float32)
        chosen = next((own for part, own in types.items() if part in tensor.name), None)
        if values.ndim == 1 or chosen is None:
            writer.add_tensor(tensor.name, values)
        else:
            stored = quantize_chunk(chosen, values, np.ones(values.shape[1]))
            writer.add_tensor(tensor.name, stored, raw_dtype=gguf.GGMLQuantizationType[chosen])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reference_logits(checkpoint: Checkpoint, path: Path) -> np.ndarray:  # [T, V]
    """Our torch model's, over the weights that a file holds."""
    model = load_model(checkpoint)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights = {}
    for info in checkpoint.spec.tensors():
        tensor = stored[gguf_name(info)]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weights[info.name] = torch.from_numpy(np.array(values, np.float32).reshape(info.shape))
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()[None])[0].numpy()


def test_activations_cost_no_more_than_in_llama_cpp(
    write_checkpoint: Callable[..., Path], reference: Path, tmp_path: Path
) -> None:
    """Nine types in a file that llama.cpp quantized: our log-probabilities are nearer than its own to those of the
    same weights with activations in FP32."""
    llama_server = pytest.importorskip("helpers.llama_server")
    folder = write_checkpoint(tmp_path / "model", 3, vocab_size=4112, tie_word_embeddings=False, **WIDE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference / name, folder / name)
    export_gguf(Checkpoint(folder), tmp_path / "whole.gguf", "F32")
    path = tmp_path / "mixed.gguf"
    quantized_by_llama_cpp(tmp_path / "whole.gguf", path, NINE_TYPES)
    expected = log_softmax(reference_logits(Checkpoint(folder), path))
    found = log_softmax(Session.open(path).logits(TOKENS))
    ours, theirs = [], []
    with llama_server.llama_cpp(path) as server:
        for length in range(2, len(TOKENS), 4):
            for step in server.complete(TOKENS[:length].tolist(), 1, logprobs=5):
                for top in step["top_logprobs"]:
                    exact = expected[length - 1][top["id"]]
                    ours.append(abs(found[length - 1][top["id"]] - exact))
                    theirs.append(abs(top["logprob"] - exact))
    assert len(ours) > 10
    assert np.median(ours) < np.median(theirs)
    assert np.quantile(ours, 0.95) < np.quantile(theirs, 0.95)
