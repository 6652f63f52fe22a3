"""The training scripts make a checkpoint that the rest of the project reads."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.evaluate.report import HELD_OUT
from qwen_quant.model import load_model
from qwen_quant.tokenizer import Tokenizer

SCRIPTS = Path(__file__).parent.parent / "scripts"


def run(script: str, *arguments: object) -> str:
    line = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_train_a_checkpoint(arch: str, tmp_path: Path) -> None:
    corpus, output = tmp_path / "corpus", tmp_path / "model"
    corpus.mkdir()
    (corpus / "en_text.txt").write_text(HELD_OUT.read_text(encoding="utf-8") * 4, encoding="utf-8")
    (corpus / "qa_sums.txt").write_text("Question: 1 + 1?\nAnswer: 1 + 1 = 2\n#### 2\n\n" * 300)
    run("train_tokenizer.py", "--corpus", corpus, "--vocab-size", 512, "-o", output)
    shape = "--hidden 64 --intermediate 64 --layers 1 --heads 2 --kv-heads 1 --context 64 --batch-tokens 256"
    said = run(
        "train_reference.py", "--corpus", corpus, "--tokenizer", output, "-o", output,
        "--arch", arch, "--minutes", 0.05, *shape.split(),
    )  # fmt: skip
    assert re.search(r"held-out bits per byte: \d+\.\d+, 3-gram \d+\.\d+", said)
    checkpoint = Checkpoint(output)
    assert checkpoint.spec.model_type == arch
    tokenizer = Tokenizer.from_folder(output)
    ids = tokenizer.encode("<|im_start|>user\n1 + 1?<|im_end|>\n", special=True)
    assert tokenizer.token_id("<|im_start|>") == ids[0]
    assert torch.isfinite(load_model(checkpoint)(torch.tensor([ids]))).all()
