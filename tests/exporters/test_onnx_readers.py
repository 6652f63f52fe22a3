"""Other programs open an exported folder and write the reference model's greedy text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.torch_greedy import greedy

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.evaluate.selfcheck import self_check
from qwen_quant.exporters.onnx import Form, export_onnx
from qwen_quant.model import load_model
from qwen_quant.quantize.stream import plain_layers
from qwen_quant.runtime.onnx import OnnxFolder
from qwen_quant.runtime.session import Session
from qwen_quant.tokenizer import Tokenizer

PROMPT, COUNT = "The history of the river is", 32
OPSETS = {"fused": None, "standard": 23}


FORMS = {
    f"{kind}-{name}": Form(kind, opset=opset) for kind in ("BF16", "int4") for name, opset in OPSETS.items()
}


@pytest.fixture(scope="module", params=FORMS.values(), ids=list(FORMS))
def folder(request: pytest.FixtureRequest, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target, checkpoint = tmp_path_factory.mktemp("onnx") / "model", Checkpoint(reference)
    rounded = plain_layers(checkpoint, request.param.grids(checkpoint))
    layers = rounded if request.param.file_type == "int4" else None
    export_onnx(checkpoint, target, request.param, layers=layers)
    return target


@pytest.fixture(scope="module")
def expected(folder: Path, reference: Path) -> list[int]:
    """The reference model's text, or what our Session makes of its weights in 4 bits."""
    prompt = Tokenizer.from_folder(reference).encode(PROMPT)
    if "q4" in OnnxFolder(folder).graph.name:
        return list(Session.open(folder).generate(prompt, COUNT))
    return greedy(load_model(Checkpoint(reference)), prompt, COUNT)


def genai_greedy(folder: Path) -> tuple[list[int], list[int]]:
    """The prompt's tokens and what onnxruntime-genai goes on with."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = genai.Model(str(folder))
    ids = genai.Tokenizer(model).encode(PROMPT)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + COUNT, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return list(ids), list(generator.get_sequence(0))[len(ids) :]


def test_onnxruntime_genai(folder: Path, expected: list[int]) -> None:
    assert genai_greedy(folder)[1] == expected


def test_qwen1_in_onnxruntime_genai(make_qwen1: Callable[..., Path], tmp_path: Path) -> None:
    """Its vocabulary is a qwen.tiktoken, which nobody else reads."""
    checkpoint = Checkpoint(make_qwen1())
    export_onnx(
        checkpoint, tmp_path / "out", Form("F32"), check=lambda path: self_check(path, checkpoint, 16)
    )
    prompt, made = genai_greedy(tmp_path / "out")
    assert prompt == Tokenizer.from_folder(checkpoint.folder).encode(PROMPT)
    wanted = greedy(load_model(checkpoint), prompt, COUNT)
    ends = [i for i, token in enumerate(wanted) if token in (4091, 4093)]
    assert made == wanted[: ends[0] + 1] if ends else made == wanted


def test_optimum(folder: Path, expected: list[int]) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime", reason="optimum-onnx is not installed")
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    for key, value in OnnxFolder(folder).options.items():
        options.add_session_config_entry(key, value)
    model = optimum.ORTModelForCausalLM.from_pretrained(folder, session_options=options)
    prompt = torch.tensor([Tokenizer.from_folder(folder).encode(PROMPT)])
    made = model.generate(prompt, max_new_tokens=COUNT, do_sample=False, eos_token_id=None)
    assert made[0, prompt.shape[1] :].tolist() == expected
