"""llama.cpp reads our GGUF files and computes what our reference model computes over the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from helpers.llama_server import llama_cpp
from helpers.torch_greedy import greedy

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.exporters.gguf import TypeOptions, export_gguf
from qwen_quant.exporters.gguf_tensors import gguf_name, stacked
from qwen_quant.model import Model, load_model
from qwen_quant.quantize.kv_weights import weights_layout
from qwen_quant.safetensors import Planned, SafetensorsWriter
from qwen_quant.tokenizer import Tokenizer

PROMPT = "The history of the river is"
TEXT = PROMPT + " written in its banks, and in the towns along them. 人们在河边生活。 def f(x): return x + 1"
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "head_dim": None,
    "tie_word_embeddings": False,
}
QWEN3 = {"head_dim": 64, "tie_word_embeddings": False}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
QWEN2_MOE = {
    **QWEN2,
    **EXPERTS,
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "shared_expert_intermediate_size": 96,
}
QWEN3_MOE = {
    **QWEN3,
    **EXPERTS,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
}
# So short a trained context that the text reaches beyond it.
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROPES = {
    "yarn": YARN,
    "yarn with its own factor": {**YARN, "original_max_position_embeddings": 64, "attention_factor": 1.3},
    "yarn with mscale": {**YARN, "factor": 2.5, "mscale": 0.7, "mscale_all_dim": 1.5},
    "linear": {"type": "linear", "factor": 3.0},
}

TEXTS = [
    "Hello, world! It's 2,024 — naïve café.",
    "  spaces \n\n\t tabs\r\n end  ",
    "中文分词测试:今天天气很好。３个苹果",
    "emoji 👩‍👩‍👧 👍🏽 Å",
    "def f(x):\n    return x ** 2  # comment\n",
    "<|im_start|>user\nHi<|im_end|>\n<think>\n",
]


def model_of(checkpoint: Checkpoint, path: Path) -> Model:
    """Our reference model over the weights that a GGUF file holds."""
    model = load_model(checkpoint)
    names = {
        gguf_name(info): members or (info,) for info, members in stacked(checkpoint.spec.tensors())
    }  # a stack of experts is several of ours
    weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        kind = gguf.GGMLQuantizationType(tensor.tensor_type)
        values = tensor.data if kind.name in ("F32", "F16") else dequantize(tensor.data, kind)
        whole = np.array(values, np.float32).reshape(len(names[tensor.name]), -1)
        for info, part in zip(names[tensor.name], whole, strict=True):
            weights[info.name] = torch.from_numpy(part.reshape(info.shape))
    model.load_state_dict(weights)
    return model


def logprob_gaps(checkpoint: Checkpoint, path: Path) -> np.ndarray:
    """How far llama.cpp's top log-probabilities after prefixes of a text lie from ours: [prefixes, 5]."""
    tokens = Tokenizer.from_folder(checkpoint.folder).encode(TEXT)
    with torch.no_grad():
        logits = model_of(checkpoint, path)(torch.tensor([tokens]))[0]
    ours = torch.log_softmax(logits.double(), dim=-1).numpy()
    gaps = []
    with llama_cpp(path) as server:
        for length in range(2, len(tokens), 2):
            # No step comes back when the next token is half a character.
            for step in server.complete(tokens[:length], 1, logprobs=5):
                row = ours[length - 1]
                best = np.sort(row)[-2:]
                assert step["id"] == row.argmax() or best[1] - best[0] < 0.1
                gaps.append([abs(top["logprob"] - row[top["id"]]) for top in step["top_logprobs"]])
    assert len(gaps) > 10
    return np.array(gaps)


@pytest.mark.parametrize("file_type", ["F16", "BF16"])
def test_greedy_tokens_of_the_bundled_model(reference: Path, tmp_path: Path, file_type: str) -> None:
    checkpoint, path = Checkpoint(reference), tmp_path / "m.gguf"
    export_gguf(checkpoint, path, file_type)
    prompt = Tokenizer.from_folder(reference).encode(PROMPT)
    with llama_cpp(path) as server:
        theirs = [step["id"] for step in server.complete(prompt, 64)]
    assert theirs == greedy(model_of(checkpoint, path), prompt, 64)


# Together with these every type of tensor.
OTHERS = (("attn_q", "Q5_K"), ("attn_k", "IQ4_NL"), ("attn_v", "Q5_0"), ("attn_output", "Q5_1"))


@pytest.mark.parametrize(
    ("file_type", "others"),
    [("Q8_0", ()), ("Q4_0", ()), ("Q4_1", ()), ("Q2_K", ()), ("Q4_K_M", ()), ("IQ4_XS", OTHERS)],
)
def test_logprobs_of_the_bundled_model(reference: Path, tmp_path: Path, file_type: str, others: Any) -> None:
    checkpoint, path = Checkpoint(reference), tmp_path / "m.gguf"
    export_gguf(checkpoint, path, file_type, TypeOptions(tensor_types=others))
    # llama.cpp rounds activations to 8 bits wherever a weight is quantized (for super-blocks with one scale for 256),
    # the reference does not: single log-probabilities move by up to 0.1 for that alone, so here only their mean is
    # bounded.
    assert logprob_gaps(checkpoint, path)[:, 0].mean() < 0.04
    # The same weights stored as F32 take the rounding away, and then every one of them has to agree.
    decoded = decoded_checkpoint(checkpoint, path, tmp_path / "decoded")
    export_gguf(decoded, tmp_path / "decoded.gguf", "F32")
    assert logprob_gaps(decoded, tmp_path / "decoded.gguf").max() < 0.005


def decoded_checkpoint(checkpoint: Checkpoint, path: Path, folder: Path) -> Checkpoint:
    """A full-precision checkpoint of the weights that a GGUF file of `checkpoint` decodes to."""
    shutil.copytree(checkpoint.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = {name: value.numpy() for name, value in model_of(checkpoint, path).state_dict().items()}
    planned = [Planned(name, "F32", value.shape) for name, value in weights.items()]
    with SafetensorsWriter(folder / "model.safetensors", planned) as writer:
        for name, value in weights.items():
            writer.write(name, value)
    return Checkpoint(folder)


@pytest.mark.parametrize(
    "family", [QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE], ids=["qwen2", "qwen3", "qwen2moe", "qwen3moe"]
)
def test_logprobs_of_every_family(make_model: Callable[..., Checkpoint], tmp_path: Path, family: Any) -> None:
    checkpoint, path = make_model(**family), tmp_path / "m.gguf"
    for file_type, limit in (("F32", 0.001), ("F16", 0.02)):
        export_gguf(checkpoint, path, file_type)
        assert logprob_gaps(checkpoint, path).max() < limit


def test_logprobs_of_qwen1(make_qwen1: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, path = Checkpoint(make_qwen1()), tmp_path / "m.gguf"
    for file_type, limit in (("F32", 0.001), ("F16", 0.02)):
        export_gguf(checkpoint, path, file_type)
        assert logprob_gaps(checkpoint, path).max() < limit
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    with llama_cpp(path) as server:
        for text in TEXTS:
            assert server.tokenize(text, special=True) == tokenizer.encode(text, special=True), text


@pytest.mark.parametrize("family", [QWEN2_MOE, QWEN3_MOE], ids=["qwen2moe", "qwen3moe"])
def test_greedy_tokens_of_models_with_experts(
    make_model: Callable[..., Checkpoint], tmp_path: Path, family: Any
) -> None:
    checkpoint, path = make_model(**family), tmp_path / "m.gguf"
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    whole = [token.isascii() and token.isalpha() for token in tokenizer.tokens]
    read = checkpoint.source.chunks

    def only_letters(name: str) -> Iterator[np.ndarray]:
        """llama.cpp's server asks for whole characters: other tokens get the logit 0."""
        parts = list(read(name))
        if name == "lm_head.weight":
            parts = [np.where(np.resize([*whole, *[False] * 4112], 4112)[:, None], np.concatenate(parts), 0)]
        return iter(parts)

    checkpoint.source.chunks = only_letters  # type: ignore[method-assign]
    export_gguf(checkpoint, path, "F16")
    prompt = tokenizer.encode(PROMPT)
    with llama_cpp(path) as server:
        theirs = [step["id"] for step in server.complete(prompt, 64)]
    assert theirs == greedy(model_of(checkpoint, path), prompt, 64)


@pytest.mark.parametrize("family", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize("rope", ROPES.values(), ids=list(ROPES))
def test_logprobs_with_an_extended_context(
    make_model: Callable[..., Checkpoint], tmp_path: Path, family: Any, rope: Any
) -> None:
    checkpoint, path = make_model(**family, rope_scaling=rope), tmp_path / "m.gguf"
    export_gguf(checkpoint, path, "F32")
    assert logprob_gaps(checkpoint, path).max() < 0.001


def test_greedy_tokens_with_an_extended_context(reference: Path, tmp_path: Path) -> None:
    """The bundled model writes whole characters, which llama.cpp's server asks for."""
    folder, path = tmp_path / "model", tmp_path / "m.gguf"
    shutil.copytree(reference, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": YARN}))
    checkpoint = Checkpoint(folder)
    export_gguf(checkpoint, path, "F16")
    prompt = Tokenizer.from_folder(folder).encode(PROMPT)
    with llama_cpp(path) as server:
        theirs = [step["id"] for step in server.complete(prompt, 64)]
    assert theirs == greedy(model_of(checkpoint, path), prompt, 64)


def test_llama_cpp_tokenizes_as_we_do(reference: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    export_gguf(Checkpoint(reference), path, "Q4_0")
    tokenizer = Tokenizer.from_folder(reference)
    with llama_cpp(path) as server:
        for text in TEXTS:
            assert server.tokenize(text, special=True) == tokenizer.encode(text, special=True), text


def test_a_stored_layout_of_the_kv_cache_changes_nothing(reference: Path, tmp_path: Path) -> None:
    """llama.cpp loads the file and says the same: the layout is metadata, no tensors that it would count."""
    checkpoint = Checkpoint(reference)
    said = []
    for name, layout in (("plain", None), ("with", weights_layout(checkpoint, "int4"))):
        path = tmp_path / f"{name}.gguf"
        export_gguf(checkpoint, path, "Q8_0", kv_layout=layout)
        with llama_cpp(path) as server:
            said.append([token["id"] for token in server.complete([40, 50, 60], 8)])
    assert said[0] == said[1]
