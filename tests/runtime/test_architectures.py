"""Every architecture that we export: the engine writes what the torch reference model writes, and its probabilities
are llama.cpp's for the same file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.torch_greedy import greedy

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.cli import main
from qwen_quant.errors import QwenQuantError
from qwen_quant.exporters.gguf import export_gguf
from qwen_quant.model import load_model
from qwen_quant.runtime.session import Session
from qwen_quant.tokenizer import Tokenizer

PROMPT = "The history of the river is"
TEXT = PROMPT + " written in its banks, and in the towns along them. 人们在河边生活。 def f(x): return x + 1"
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen": {"seq_length": 512, "vocab_size": 4304},
    "qwen2": QWEN2,
    "qwen2moe": {
        **EXPERTS,
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "head_dim": None,
        "shared_expert_intermediate_size": 96,
    },
    "qwen3": {},
    "qwen3moe": {
        **EXPERTS,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "norm_topk_prob": True,
    },
}
# Of models whose best token leads the next by at least 0.04 wherever the greedy text goes: rounding cannot swap them.
SEEDS = {"qwen": 7, "qwen2": 18, "qwen2moe": 10, "qwen3": 0, "qwen3moe": 9}
EVERY = pytest.mark.parametrize("family", list(FAMILIES))
SPARSE = pytest.mark.parametrize("family", ["qwen2moe", "qwen3moe"])


@dataclass
class Made:
    """A checkpoint, and its GGUF files by type."""

    checkpoint: Checkpoint

    def file(self, file_type: str) -> Path:
        path = self.checkpoint.folder / f"{file_type}.gguf"
        if not path.is_file():
            export_gguf(self.checkpoint, path, file_type)
        return path

    def tokens(self, text: str) -> list[int]:
        return Tokenizer.from_folder(self.checkpoint.folder).encode(text)


@pytest.fixture(scope="module")
def made(
    write_checkpoint: Callable[..., Path],
    write_qwen1: Callable[..., Path],
    reference: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Made]:
    """made("qwen3moe"): a random model with the bundled tokenizer, each made once."""
    found: dict[str, Made] = {}

    def get(family: str) -> Made:
        if family not in found:
            folder = tmp_path_factory.mktemp(family)
            write = write_qwen1 if family == "qwen" else write_checkpoint
            changes = {"vocab_size": 4112, "tie_word_embeddings": False, **FAMILIES[family]}
            write(folder, SEEDS[family], **changes)
            if family != "qwen":  # which has its own
                for name in ("tokenizer.json", "tokenizer_config.json"):
                    shutil.copy(reference / name, folder / name)
            found[family] = Made(Checkpoint(folder))
        return found[family]

    return get


@EVERY
def test_greedy_text_and_logits_of_the_reference(made: Callable[[str], Made], family: str) -> None:
    model = load_model(made(family).checkpoint)
    session = Session.open(made(family).file("F16"), n_threads=2)
    assert session.engine.architecture == family
    prompt = made(family).tokens(PROMPT)
    expected = greedy(model, prompt, 64)
    assert list(session.generate(prompt, 64)) == expected
    tokens = [*prompt, *expected]
    with torch.no_grad():
        reference = model(torch.tensor([tokens]))[0].numpy()
    assert np.abs(session.logits(tokens) - reference).max() < 0.02


def log_softmax(logits: np.ndarray) -> np.ndarray:  # [T, V]
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def llama_cpp_gaps(path: Path, tokens: list[int]) -> np.ndarray:
    """How far llama.cpp's top log-probabilities after prefixes of `tokens` lie from the engine's: [prefixes, 5]."""
    llama_server = pytest.importorskip("helpers.llama_server")
    ours = log_softmax(Session.open(path).logits(tokens))
    gaps = []
    with llama_server.llama_cpp(path) as server:
        for length in range(2, len(tokens), 2):
            for step in server.complete(tokens[:length], 1, logprobs=5):  # none after half a character
                row = ours[length - 1]
                gaps.append([abs(top["logprob"] - row[top["id"]]) for top in step["top_logprobs"]])
    assert len(gaps) > 10
    return np.array(gaps)


@EVERY
def test_probabilities_of_llama_cpp(made: Callable[[str], Made], family: str) -> None:
    """The engine keeps keys and values in FP16, llama.cpp rounds activations to FP16 in its products."""
    gaps = llama_cpp_gaps(made(family).file("F16"), made(family).tokens(TEXT))
    assert np.median(gaps) < 0.005
    assert gaps.max() < 0.02


@SPARSE
@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_0"])
def test_quantized_experts_as_in_llama_cpp(made: Callable[[str], Made], family: str, file_type: str) -> None:
    """Both round activations to 8 bits, in their own ways; now and then that leads to another expert."""
    gaps = llama_cpp_gaps(made(family).file(file_type), made(family).tokens(TEXT))
    assert np.median(gaps) < 0.1
    assert np.quantile(gaps, 0.95) < 0.3


def test_qwen1_is_not_run_beyond_its_context(made: Callable[[str], Made]) -> None:
    path = made("qwen").file("F16")
    with pytest.raises(QwenQuantError, match="n_ctx 513 exceeds the context_length of 512"):
        Session.open(path, n_ctx=513)
    with pytest.raises(
        QwenQuantError, match=r"exceed the context of 512; shorten the prompt or generate less$"
    ):
        Session.open(path).prefill([1] * 513)


@SPARSE
def test_experts_on_the_command_line(
    made: Callable[[str], Made], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, folder = made(family).file("F16"), made(family).checkpoint.folder
    texts = []
    for model in (path, folder):
        assert main(["run", str(model), "-p", PROMPT, "--raw", "-n", "8", "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 8
    options = ["--ctx", "64", "--max-windows", "2", "--json"]
    assert main(["eval", str(path), "--reference", str(folder), *options]) == 0
    assert json.loads(capsys.readouterr().out)["kld_mean"] < 1e-3
