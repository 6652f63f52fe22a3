"""Damaged input, places that cannot be written, and Ctrl-C: one line, exit code 1, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_quant.safetensors import SafetensorsFile

CALIBRATION = ["--num-samples", "4", "--seq-len", "32"]
# Every command that reads a checkpoint: its arguments for a model folder and an output.
READERS: dict[str, Callable[[Path, Path], list[object]]] = {
    "eval": lambda model, out: ["eval", model, "--ctx", "32", "--max-windows", "1"],
    "run": lambda model, out: ["run", model, "-p", "x", "--raw", "-n", "1"],
    "gptq": lambda model, out: ["gptq", model, "-o", out, "--group-size", "32", *CALIBRATION],
    "gptq plain": lambda model, out: ["gptq", model, "-o", out, "--group-size", "32", "--no-calibration"],
    "export": lambda model, out: ["export", model, "-o", out, "--type", "Q4_0", *CALIBRATION],
    "export plain": lambda model, out: ["export", model, "-o", out, "--type", "F16"],
}
WRITERS = [name for name in READERS if name.startswith(("gptq", "export"))]


def remove_shard(folder: Path) -> str:
    (folder / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors: this shard is missing"


def cut_shard(folder: Path) -> str:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return f"{path}: tensor '"


def huge_header(folder: Path) -> str:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + path.read_bytes()[8:])
    return f"{path}: header length 1152921504606846976"


def nan_weight(folder: Path) -> str:
    path = folder / "model-00002-of-00002.safetensors"
    name = "model.layers.1.mlp.down_proj.weight"
    entry = SafetensorsFile(path).entries[name]
    with path.open("r+b") as file:
        file.seek(entry.offset + 10)
        file.write(np.uint16(0x7FC0).tobytes())
    return f"tensor {name!r} holds 1 NaN"


def unknown_rope(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "spiral", "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config))
    return "config.json: rope_scaling has rope type 'spiral'"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json: not found"


def config_is_no_json(folder: Path) -> str:
    (folder / "config.json").write_text('{"hidden_size": ')
    return "config.json: cannot be read as JSON"


def no_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json: not found"


BREAKAGES = [
    remove_shard,
    cut_shard,
    huge_header,
    nan_weight,
    unknown_rope,
    no_config,
    config_is_no_json,
    no_tokenizer,
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def assert_one_line(outcome: object, message: str, code: int = 1) -> None:
    assert outcome.out == ""
    assert outcome.err.startswith("qwen-quant: ")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.code == code


def listing(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_damaged_checkpoint(
    breakage: Callable[[Path], str], reader: str, cli: Callable, make_model: Callable, tmp_path: Path
) -> None:
    if reader == "gptq plain" and breakage is no_tokenizer:
        pytest.skip("plain rounding needs no tokenizer")
    folder = make_model(shards=2)
    message = breakage(folder)
    before = listing(tmp_path)
    assert_one_line(cli(*READERS[reader](folder, tmp_path / "out")), message)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("where", ["/proc/out", "{file}/out"])
@pytest.mark.parametrize("writer", WRITERS)
def test_output_that_cannot_be_written(
    writer: str, where: str, cli: Callable, make_model: Callable, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    folder, target = make_model(), Path(where.format(file=tmp_path / "file"))
    before = listing(tmp_path)
    assert_one_line(cli(*READERS[writer](folder, target)), f"{target}: cannot be written")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("writer", ["gptq", "export"])
@pytest.mark.parametrize(("content", "message"), [("", "empty"), (None, "no such file")])
def test_bad_calibration_file(
    writer: str, content: str | None, message: str, cli: Callable, make_model: Callable, tmp_path: Path
) -> None:
    data = tmp_path / "data.txt"
    if content is not None:
        data.write_text(content)
    arguments = READERS[writer](make_model(), tmp_path / "out")
    found = cli(*arguments, "--dataset", data)
    assert_one_line(found, str(data))
    assert not (tmp_path / "out").exists()


def test_empty_evaluation_data(cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert_one_line(cli("eval", make_model(), "--data", tmp_path / "empty.txt"), "empty.txt: is empty")


@pytest.mark.parametrize("command", [["run", "-p", "x"], ["eval", "--ctx", "32", "--max-windows", "1"]])
@pytest.mark.parametrize("share", [0.0, 1e-6, 5e-6, 1e-4, 0.01, 0.02, 0.5, 0.999, None])
def test_cut_gguf(
    command: list[str], share: float | None, cli: Callable, gguf_file: Path, tmp_path: Path
) -> None:
    content = gguf_file.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[: -1 if share is None else int(len(content) * share)])
    assert_one_line(cli(command[0], cut, *command[1:]), str(cut))


def shows_text(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return bool(process.stdout.read(1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_generation(number: int, interrupted: Callable, gguf_file: Path) -> None:
    arguments = ["run", gguf_file, "--raw", "-p", "x", "-n", "2000", "--isa", "scalar", "-t", "1"]
    found = interrupted(arguments, shows_text, number)
    assert (found.code, found.err) == (1, "qwen-quant: interrupted\n")


def test_interrupted_evaluation(interrupted: Callable, gguf_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    os.mkfifo(data)  # it opens for writing once the other side reads
    writer: list[int] = []

    def reads(_: object) -> bool:
        try:
            writer.append(os.open(data, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    found = interrupted(["eval", gguf_file, "--data", data, "--json"], reads)
    os.close(writer[0])
    assert (found.code, found.out, found.err) == (1, "", "qwen-quant: interrupted\n")


@pytest.mark.parametrize("writer", ["gptq", "export"])
def test_interrupted_quantization(
    writer: str, interrupted: Callable, make_model: Callable, tmp_path: Path
) -> None:
    folder = make_model(num_hidden_layers=40)
    before = listing(tmp_path)
    target = tmp_path / "out"
    found = interrupted(READERS[writer](folder, target), lambda _: any(tmp_path.glob(".out.*.partial")))
    assert (found.code, found.out, found.err) == (1, "", "qwen-quant: interrupted\n")
    assert listing(tmp_path) == before
