"""Running the command line: inside this process where it can be, as a process of its own where it must."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.scripted import scripted

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.cli import main
from qwen_quant.exporters.gguf import export_gguf
from qwen_quant.runtime.session import Session
from qwen_quant.tokenizer import Tokenizer

COMMAND = [sys.executable, "-m", "qwen_quant.cli"]


@dataclass
class Outcome:
    """What a run left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on stdout; anything else there fails."""
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Outcome]]:
    """cli("eval", path, …): runs `main` here."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    terminate = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    yield run
    signal.signal(signal.SIGTERM, terminate)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """say(answers…): what the model says next; the list fills with what it had read."""

    def script(*answers: str) -> list[str]:
        contexts: list[str] = []
        monkeypatch.setattr(Session, "generate", scripted(answers, contexts.append))
        return contexts

    return script


@pytest.fixture
def process() -> Callable[..., Outcome]:
    """process("run", path, …): runs `python -m qwen_quant.cli`."""

    def run(*arguments: object, stdin: str = "", environment: dict[str, str] | None = None) -> Outcome:
        done = subprocess.run(
            COMMAND + [str(argument) for argument in arguments],
            input=stdin,
            capture_output=True,
            text=True,
            env={**os.environ, **(environment or {})},
            timeout=120,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def interrupted() -> Callable[..., Outcome]:
    """interrupted([…], ready, number): a process that gets signal `number` once `ready(process)` is true."""

    def run(
        arguments: Sequence[object],
        ready: Callable[[subprocess.Popen[str]], bool],
        number: int = signal.SIGINT,
    ) -> Outcome:
        command = COMMAND + [str(argument) for argument in arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 100
        while not ready(process):
            assert process.poll() is None, f"ended too early: {process.communicate()}"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        return Outcome(process.returncode, out, err)

    return run


@pytest.fixture
def make_model(make_checkpoint: Callable[..., Path], reference: Path) -> Callable[..., Path]:
    """A function that writes a random checkpoint with the bundled tokenizer; rows beyond it are padding."""

    def make(seed: int = 0, name: str = "model", **changes: object) -> Path:
        folder = make_checkpoint(
            seed=seed, name=name, **{"vocab_size": 4112, "eos_token_id": 4093, **changes}
        )
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(reference / file, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def gguf_file(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as F16 GGUF."""
    path = tmp_path_factory.mktemp("gguf") / "reference.gguf"
    export_gguf(Checkpoint(reference), path, "F16")
    return path


TOOL_TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {%- set call = call.function or call %}
        {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


@pytest.fixture(scope="session")
def tool_file(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as GGUF with a template that has a place for tools."""
    folder = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(reference, folder)
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE, encoding="utf-8")
    export_gguf(Checkpoint(folder), folder / "tools.gguf", "F16")
    return folder / "tools.gguf"


@pytest.fixture(scope="session")
def tokenizer(reference: Path) -> Tokenizer:
    return Tokenizer.from_folder(reference)
