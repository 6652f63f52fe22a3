"""A Session on an ONNX folder does what it does on a GGUF file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers.torch_greedy import greedy

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import FormatError, QwenQuantError
from qwen_quant.exporters.onnx import Form, export_onnx
from qwen_quant.model import Model, load_model
from qwen_quant.runtime.onnx import OnnxEngine, OnnxFolder
from qwen_quant.runtime.session import Session

PROMPT = "The history of the river is"


@pytest.fixture(scope="module")
def model(reference: Path) -> Model:
    return load_model(Checkpoint(reference))


@pytest.fixture(scope="module")
def folder(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("onnx") / "model"
    export_onnx(Checkpoint(reference), target, Form("BF16"))
    return target


@pytest.fixture
def session(folder: Path) -> Session:
    return Session.open(folder, n_threads=1)


def test_greedy_tokens(session: Session, model: Model) -> None:
    prompt = session.tokenizer.encode(PROMPT)
    assert list(session.generate(prompt, 48)) == greedy(model, prompt, 48)
    assert session.n_past == len(prompt) + 47
    assert session.eos_ids == {4091, 4093}
    assert session.n_vocab == 4096 and session.n_ctx == 2048


def test_long_prompts_and_going_back(session: Session, model: Model) -> None:
    """Chunks of a prompt, a cache that grows on the way, and a second answer after the first was taken back."""
    tokens = np.random.default_rng(0).integers(0, 4000, 700)
    with torch.no_grad():
        wanted = model(torch.from_numpy(tokens)[None])[0].numpy()
    assert np.abs(session.logits(tokens) - wanted).max() < 1e-3
    session.truncate(600)
    assert np.abs(session.prefill(tokens[600:650]) - wanted[649]).max() < 1e-3
    assert np.abs(session.step(int(tokens[650])) - wanted[650]).max() < 1e-3
    assert list(session.keep_shared([*tokens[:100].tolist(), 5])) == [5]
    session.reset()
    assert session.n_past == 0
    assert np.abs(session.prefill(tokens[:9]) - wanted[8]).max() < 1e-3


def test_what_cannot_be_run(folder: Path, session: Session, tmp_path: Path) -> None:
    with pytest.raises(QwenQuantError, match="token id 4096 is outside"):
        session.prefill([4096])
    short = Session.open(folder, n_threads=1, n_ctx=8)
    with pytest.raises(QwenQuantError, match="do not fit into the context of 8"):
        short.prefill(list(range(9)))
    with pytest.raises(QwenQuantError, match="cannot keep 5"):
        session.truncate(5)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "onnx" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(FormatError, match=r"model\.onnx: onnxruntime cannot load it"):
        Session.open(broken)
    (broken / "onnx" / "model.onnx").unlink()
    with pytest.raises(FormatError, match=r"model\.onnx: not found, but genai_config\.json names it"):
        Session.open(broken)
    (broken / "genai_config.json").write_text(json.dumps({"model": []}))
    with pytest.raises(FormatError, match=r"genai_config\.json: cannot be read"):
        Session.open(broken)


def test_torch_stays_unloaded(folder: Path) -> None:
    code = (
        "import sys; from qwen_quant.runtime.session import Session; "
        f"Session.open({str(folder)!r}, n_threads=1).prefill([1, 2]); "
        "print(sorted({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tempfile.gettempdir(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_threads_as_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    seen = []
    real = onnxruntime.InferenceSession

    def spy(path: str, options: onnxruntime.SessionOptions, **more: object) -> object:
        seen.append(options.intra_op_num_threads)
        return real(path, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    OnnxEngine(OnnxFolder(folder), n_threads=2)
    assert seen == [2]


def test_dimensions_that_only_the_config_gives(folder: Path, tmp_path: Path) -> None:
    """As onnxruntime-genai's builder writes its graphs."""
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    path = OnnxFolder(copy).graph
    graph = onnx.load(path, load_external_data=False)
    for value in graph.graph.input:
        if value.name.startswith("past_key_values"):
            value.type.tensor_type.shape.dim[3].dim_param = "kv_cache_dim"
    onnx.save(graph, path)
    prompt = Session.open(folder).tokenizer.encode(PROMPT)
    made = [list(Session.open(model, n_threads=1).generate(prompt, 8)) for model in (folder, copy)]
    assert made[0] == made[1]
    config = json.loads((copy / "genai_config.json").read_text())
    del config["model"]["decoder"]["head_size"]
    (copy / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"past_key_values\.0\.key has no fixed size"):
        Session.open(copy)
