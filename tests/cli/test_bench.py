"""`qwen-quant bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_quant.errors import QwenQuantError
from qwen_quant.runtime import agreement, bench

KEYS = ["pp_tok_s", "tg_tok_s", "load_s", "rss_mb"]
KEYS += ["bandwidth_gb_s", "bandwidth_fraction", "int8_gop_s", "int8_fraction"]
FAST = ["-p", "8", "-n", "2", "-r", "1"]


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "probe_bytes", lambda: 1 << 20)


def test_json_of_one_measurement_holds_numbers(cli: Callable, gguf_file: Path) -> None:
    found = cli("bench", gguf_file, *FAST, "-d", "4", "-t", "1", "--json").json
    assert all(isinstance(found[key], float) and found[key] > 0 for key in KEYS)
    assert (found["n_prompt"], found["n_gen"], found["n_depth"], found["n_threads"]) == (8, 2, 4, 1)
    assert found["checked_tokens"] == 16
    assert found["equal_tokens"] >= 15


def test_an_onnx_folder(cli: Callable, reference: Path, tmp_path: Path) -> None:
    line = ["export", reference, "--format", "onnx", "--type", "F16", "--no-verify", "-o", tmp_path / "out"]
    assert cli(*line).code == 0
    found = cli("bench", tmp_path / "out", *FAST, "-t", "1", "--json").json
    assert found["pp_tok_s"] > 0 and found["tg_tok_s"] > 0 and found["n_threads"] == 1


def test_json_of_several_holds_lists(cli: Callable, gguf_file: Path) -> None:
    found = cli("bench", gguf_file, *FAST, "-d", "0,30", "-t", "1,2", "--json", "--no-check").json
    assert found["n_threads"] == [1, 1, 2, 2]
    assert found["n_depth"] == [0, 30, 0, 30]
    assert all(len(found[key]) == 4 for key in KEYS)
    assert "checked_tokens" not in found


def test_piped_output_is_plain(cli: Callable, gguf_file: Path) -> None:
    found = cli("bench", gguf_file, *FAST, "-n", "0", "--no-check")
    assert (found.code, found.err) == (0, "")
    assert "| threads | depth | prompt tok/s |" in found.out
    assert "GB/s" in found.out
    assert found.out.isascii()


def test_wrong_kernels_do_not_score(cli: Callable, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disagree(*_: object) -> None:
        raise QwenQuantError("x.gguf: the avx2 kernels generate token 1")

    monkeypatch.setattr(agreement, "check_greedy", disagree)
    found = cli("bench", gguf_file, *FAST, "--json")
    assert (found.code, found.out) == (1, "")
    assert found.err == "qwen-quant: x.gguf: the avx2 kernels generate token 1\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-d", "0;1"], "-d 0;1: give numbers separated by commas"),
        (["-t", "1,"], "-t 1,: give numbers"),
        (["-t", "0"], "a number of threads is 1 or more"),
        (["-p", "0", "-n", "0"], "give the tokens of a prompt (-p) or to generate (-n)"),
    ],
)
def test_bad_options_are_named(options: list[str], message: str, cli: Callable, gguf_file: Path) -> None:
    found = cli("bench", gguf_file, *options)
    assert (found.code, found.out) == (2, "")
    assert message in found.err
    assert found.err.count("\n") == 1
