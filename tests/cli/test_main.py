"""What every command shares: help, version, errors and exit codes, and what is not imported."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_quant import __version__
from qwen_quant.cli import output
from qwen_quant.errors import CheckpointError, UsageError
from qwen_quant.runtime.session import Session

COMMANDS = ("gptq", "export", "run", "bench", "eval", "demo")


def test_help_names_every_command(cli: Callable) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        found = cli(*arguments)
        assert (found.code, found.err) == (0, "")
        for command in COMMANDS:
            assert f"\n  {command} " in found.out


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_explain_themselves(command: str, cli: Callable) -> None:
    found = cli(command, "--help")
    assert found.code == 0
    assert "MODEL" in found.out
    assert "--json" in found.out


def test_version(cli: Callable) -> None:
    assert cli("--version").out == f"qwen-quant {__version__}\n"


def test_help_is_quick(process: Callable) -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process("--help").code == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # CPU time, which a busy machine does not stretch as it does the clock's.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("arguments", [["--help"], ["run", "{file}", "-p", "Hello", "-n", "2", "--json"]])
def test_heavy_packages_stay_out(arguments: list[str], gguf_file: Path) -> None:
    code = (
        "import sys; from qwen_quant.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'gguf', 'array_api_compat', 'numpy'} & set(sys.modules); "
        "print(sorted(heavy), file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *(a.format(file=gguf_file) for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frobnicate"], "No such option: --frobnicate"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["run"], "Missing argument 'MODEL'"),
        (["run", "x", "-n", "many"], "Invalid value for '-n'"),
        (["run", "x", "-t", "0", "-p", "y"], "Invalid value for '--threads'"),
        (["gptq", "x"], "Missing option"),
        (["export", "x"], "Missing option"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(arguments: list[str], message: str, cli: Callable) -> None:
    found = cli(*arguments)
    assert found.code == 2
    assert found.out == ""
    assert found.err.startswith("qwen-quant: ")
    assert message in found.err
    assert found.err.count("\n") == 1


def raising(error: BaseException) -> Callable:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (CheckpointError("a: b;\n c"), "a: b; c", 1),
        (UsageError("this or that"), "this or that", 2),
        (KeyboardInterrupt(), "interrupted", 1),
        (MemoryError(), "out of memory; close other programs, or choose a smaller model or fewer samples", 1),
        (
            OSError(errno.ENOSPC, "No space left on device", "/out/x"),
            "/out/x: No space left on device; free some space or choose another place with -o",
            1,
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied", 1),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            "this command needs torch, which is not installed; pip install 'qwen-quant[quantize]'",
            1,
        ),
        (ValueError("odd"), "unexpected ValueError: odd (a bug: QWEN_QUANT_DEBUG=1 shows where)", 1),
    ],
)
def test_every_error_is_one_line(
    error: BaseException,
    line: str,
    code: int,
    cli: Callable,
    monkeypatch: pytest.MonkeyPatch,
    gguf_file: Path,
) -> None:
    monkeypatch.setattr(Session, "of", raising(error))
    found = cli("run", gguf_file, "-p", "x")
    assert (found.code, found.out, found.err) == (code, "", f"qwen-quant: {line}\n")
    error.__traceback__ = None  # this list lives on, and would keep what the command had loaded


def test_debug_shows_the_traceback(cli: Callable, monkeypatch: pytest.MonkeyPatch, gguf_file: Path) -> None:
    monkeypatch.setattr(Session, "of", raising(ValueError("odd")))
    flagged = cli("--debug", "run", gguf_file, "-p", "x")
    monkeypatch.setenv("QWEN_QUANT_DEBUG", "1")
    for found in (flagged, cli("run", gguf_file, "-p", "--debug")):
        assert found.code == 1
        assert "Traceback (most recent call last)" in found.err
        assert "unexpected ValueError: odd" in found.err.splitlines()[-1]


def test_json_has_no_numbers_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (1, "é")}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": [1, "é"]}}
