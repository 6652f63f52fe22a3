"""Qwen (1) on the whole road: GPTQ, GGUF with the same integers, and the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.cli import main
from qwen_quant.exporters.gguf import export_gguf
from qwen_quant.model import load_model
from qwen_quant.runtime.session import Session
from qwen_quant.tokenizer import Tokenizer

TEXT = "The history of the river is written in its banks. 人们在河边生活。"


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def test_engine_equals_the_reference_model(make_qwen1: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_qwen1())
    export_gguf(checkpoint, tmp_path / "m.gguf", "F32")
    tokens = Tokenizer.from_folder(checkpoint.folder).encode(TEXT)
    with torch.no_grad():
        expected = load_model(checkpoint)(torch.tensor([tokens]))[0, -1].numpy()
    found = np.asarray(Session.open(tmp_path / "m.gguf").prefill(tokens))
    assert np.abs(found - expected).max() < 0.01  # the engine's cache is FP16


def test_gptq_and_gguf_hold_the_same_weights(
    make_qwen1: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, quantized, path = make_qwen1(), tmp_path / "int4", tmp_path / "m.gguf"
    run("gptq", folder, "-o", quantized, "--group-size", 32, "--num-samples", 8, "--seq-len", 64, "--json")
    reports = json.loads(capsys.readouterr().out)["layers"]
    assert len(reports) == 10 and all(report["error"] < report["rtn_error"] for report in reports)
    assert (quantized / "qwen.tiktoken").is_file()
    config = json.loads((quantized / "config.json").read_text())
    assert config["architectures"] == ["QWenLMHeadModel"] and config["model_type"] == "qwen"

    checkpoint = Checkpoint(quantized)
    stored = {name for name in checkpoint.source.names() if name.endswith("qweight")}
    modules = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    assert stored == {f"transformer.h.{i}.{name}.qweight" for i in range(2) for name in modules}

    run("export", quantized, "--format", "gguf", "-o", path, "--json")
    run("eval", path, "--reference", quantized, "--max-windows", 2, "--ctx", 128, "--json")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    # The same integers; the engine rounds activations to 8 bits.
    assert found["kld_mean"] < 0.01


def test_chat_gets_the_default_system_message(make_qwen1: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_qwen1()
    export_gguf(Checkpoint(folder), tmp_path / "m.gguf", "F16")
    messages = [{"role": "user", "content": "Hi"}]
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    for tokenizer in (Tokenizer.from_folder(folder), Session.open(tmp_path / "m.gguf").tokenizer):
        ids = tokenizer.apply_chat_template(messages)
        assert ids == tokenizer.encode(expected, special=True)
