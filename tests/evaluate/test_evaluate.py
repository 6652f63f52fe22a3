"""Whole evaluations: against transformers, against themselves, and across formats."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import QwenQuantError
from qwen_quant.evaluate import evaluate, evaluate_windows
from qwen_quant.evaluate.perplexity import tokenize
from qwen_quant.evaluate.report import HELD_OUT, read_text
from qwen_quant.exporters.gguf import export_gguf
from qwen_quant.exporters.gptq import export_gptq
from qwen_quant.grids.gptq import IntGrid
from qwen_quant.quantize.recipe import Recipe, linear_grid
from qwen_quant.quantize.stream import plain_layers
from qwen_quant.tokenizer import Tokenizer

CTX = 33


def scored_by_transformers(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [n, V] in float64 that score the second halves of `windows` [n_windows, ctx]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(windows).logits
    return F.log_softmax(logits[:, CTX // 2 : -1].double(), dim=-1).flatten(0, 1)


@pytest.fixture
def gptq_folder(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A plainly rounded 4-bit GPTQ checkpoint of `make_model()`."""
    checkpoint = Checkpoint(make_model(name="model"))
    grid, recipe = IntGrid(4, 32, sym=True), Recipe(calibrate=False)
    layers = plain_layers(checkpoint, linear_grid(grid))
    export_gptq(checkpoint, layers, tmp_path / "gptq", grid, recipe, recipe.record())
    return tmp_path / "gptq"


def test_numbers_equal_an_independent_computation(
    make_model: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    model, other = make_model(seed=1, name="a"), make_model(seed=2, name="b")
    result = evaluate(model, other, ctx=CTX, max_windows=3)

    ids = tokenize(tokenizer, read_text(HELD_OUT))[: 3 * CTX].astype(np.int64)
    windows = torch.from_numpy(ids).reshape(3, CTX)
    targets = windows[:, CTX // 2 + 1 :].flatten()
    q, p = scored_by_transformers(model, windows), scored_by_transformers(other, windows)
    nll = -q.gather(1, targets[:, None])[:, 0]
    kld = (p.exp() * (p - q)).sum(-1)
    assert result.tokens == len(targets) == 3 * (CTX - CTX // 2 - 1)
    assert result.ppl == pytest.approx(nll.mean().exp().item(), rel=1e-5)
    assert result.ppl_stderr == pytest.approx(
        (nll.mean().exp() * nll.std() / len(nll) ** 0.5).item(), rel=1e-5
    )
    expected = (-p.gather(1, targets[:, None]).mean()).exp().item()
    assert result.ppl_reference == pytest.approx(expected, rel=1e-5)
    assert result.kld_mean == pytest.approx(kld.mean().item(), rel=1e-4)
    assert result.kld_p99 == pytest.approx(kld.quantile(0.99).item(), rel=1e-4)
    assert result.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


def test_a_model_does_not_diverge_from_itself(make_model: Callable[..., Path]) -> None:
    folder = make_model()
    result = evaluate(folder, folder, ctx=32, max_windows=2)
    assert result.kld_mean == result.kld_max == 0.0
    assert result.top1_agreement == 1.0
    assert result.ppl == result.ppl_reference


def test_without_a_reference_only_perplexity(make_model: Callable[..., Path]) -> None:
    result = evaluate(make_model(), ctx=32, max_windows=2)
    assert result.ppl > 1.0
    assert result.kld_mean is result.ppl_reference is result.top1_agreement is None


def test_f32_gguf_agrees_with_its_checkpoint(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model()
    export_gguf(Checkpoint(folder), tmp_path / "f32.gguf", "F32")
    result = evaluate(tmp_path / "f32.gguf", folder, ctx=64, max_windows=2)
    assert result.kld_mean is not None
    assert result.kld_mean < 1e-6  # the engine keeps keys and values in F16
    assert result.ppl == pytest.approx(result.ppl_reference, rel=1e-3)
    assert result.top1_agreement == 1.0


def test_gptq_folder_and_its_gguf_tell_the_same(gptq_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export_gguf(Checkpoint(gptq_folder), tmp_path / "q.gguf")
    first = evaluate(gptq_folder, folder, ctx=64, max_windows=2)
    second = evaluate(tmp_path / "q.gguf", folder, ctx=64, max_windows=2)
    assert first.kld_mean is not None
    assert second.kld_mean is not None
    assert first.kld_mean > 1e-3
    # The engine also rounds activations to 8 bits, and the embedding is Q8_0.
    assert second.kld_mean == pytest.approx(first.kld_mean, rel=0.1)


def test_gguf_against_gguf_needs_no_torch(make_model: Callable[..., Path], tmp_path: Path) -> None:
    export_gguf(Checkpoint(make_model()), tmp_path / "model.gguf", "F16")
    code = (
        "import sys; from qwen_quant.evaluate import evaluate; path = sys.argv[1]; "
        "result = evaluate(path, path, ctx=32, max_windows=1); "
        "print(result.kld_mean, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.gguf")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0.0", "False", "False"]


def test_padding_rows_of_one_model_do_not_count(fixed_logits: Callable[..., object]) -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((12, 12)).astype(np.float32)
    padded = np.concatenate([rows, rng.standard_normal((12, 4)).astype(np.float32)], axis=1)
    windows = rng.integers(0, 12, size=(3, 16)).astype(np.int32)
    result = evaluate_windows(fixed_logits(padded), fixed_logits(rows), windows)
    assert result.kld_mean == pytest.approx(0.0, abs=1e-12)
    assert result.top1_agreement == 1.0
    assert result.ppl > (result.ppl_reference or 0.0)  # the padding takes its share of the probability


def test_windows_are_read_one_after_the_other(fixed_logits: Callable[..., object]) -> None:
    provider = fixed_logits(np.eye(12))
    windows = np.arange(48, dtype=np.int32).reshape(3, 16) % 12
    evaluate_windows(provider, None, windows)
    assert [w.tolist() for w in provider.windows] == windows.tolist()


def test_windows_beyond_the_context_are_refused(fixed_logits: Callable[..., object]) -> None:
    with pytest.raises(QwenQuantError, match=r"fixed: windows of 16 tokens exceed its context of 8; .*--ctx"):
        evaluate_windows(fixed_logits(np.eye(4), max_ctx=8), None, np.zeros((1, 16), np.int32))


def test_tokens_beyond_the_head_are_refused(fixed_logits: Callable[..., object]) -> None:
    with pytest.raises(QwenQuantError, match="token id 4, the model only 4 rows"):
        evaluate_windows(fixed_logits(np.eye(4)), None, np.full((1, 16), 4, np.int32))


def test_nan_logits_are_reported(fixed_logits: Callable[..., object]) -> None:
    rows = np.eye(4)
    rows[2, 1] = np.nan
    with pytest.raises(QwenQuantError, match="fixed: computes NaN"):
        evaluate_windows(fixed_logits(rows), None, np.full((1, 16), 2, np.int32))


def test_models_of_different_tokenizers_are_not_compared(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder, other = make_model(name="a"), make_model(name="b")
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    content = json.loads(text)
    content["model"]["merges"] = content["model"]["merges"][:100]  # words fall into other tokens
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(QwenQuantError, match="different tokens; --reference must be"):
        evaluate(folder, other, ctx=32, max_windows=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"caf\xe9 au lait", "not UTF-8 text .byte 3"),
        (None, "cannot be read"),
    ],
)
def test_bad_data_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(QwenQuantError, match=f"{path}: .*{message}"):
        read_text(path)


def test_the_held_out_text_is_not_calibration_data() -> None:
    from qwen_quant import calib_data

    lines = [line for line in read_text(HELD_OUT).splitlines() if len(line) > 60]
    known = "\n".join(document.text + str(document.messages) for document in calib_data.load("builtin"))
    assert len(lines) > 100
    assert [line for line in lines if line in known] == []


def test_windows_are_as_long_as_the_config_extends_the_context(
    make_model: Callable[..., Path], make_qwen1: Callable[..., Path]
) -> None:
    """A checkpoint runs up to YaRN's length, Qwen (1) beyond the length it was trained on."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    extended = make_model(max_position_embeddings=64, rope_scaling=yarn)
    for folder, longest in ((extended, 256), (make_qwen1(), 512)):
        assert evaluate(folder, None, ctx=longest, max_windows=1).ppl > 1
        with pytest.raises(QwenQuantError, match=f"exceed its context of {longest}"):
            evaluate(folder, None, ctx=longest + 1, max_windows=1)
