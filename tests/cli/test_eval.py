"""`qwen-quant eval`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

KEYS = {"ppl", "ppl_stderr", "ppl_reference", "kld_mean", "kld_p99", "top1_agreement", "tokens"}


def test_json_contract(cli: Callable, gguf_file: Path, reference: Path, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("It rained all night, and in the morning the road was gone.\n" * 40)
    arguments = ["eval", gguf_file, "--reference", "reference", "--data", tmp_path / "data.txt"]
    found = cli(*arguments, "--ctx", "64", "--max-windows", "3", "--json").json
    assert found.keys() >= KEYS
    assert found["tokens"] == 3 * 31
    assert found["ppl"] == pytest.approx(found["ppl_reference"], rel=1e-2)
    assert 0 <= found["kld_mean"] < 1e-3
    assert found["kld_mean"] <= found["kld_p99"]
    assert found["top1_agreement"] > 0.9


def test_table_and_default_data(cli: Callable, gguf_file: Path) -> None:
    found = cli("eval", gguf_file, "--reference", gguf_file, "--ctx", "64", "--max-windows", "2", "-t", "1")
    assert (found.code, found.err) == (0, "")
    for label in ("perplexity", "KLD mean", "KLD 99th percentile", "top-1 agreement", "100.00 %"):
        assert label in found.out


def test_without_reference_there_is_perplexity(cli: Callable, gguf_file: Path) -> None:
    found = cli("eval", gguf_file, "--ctx", "64", "--max-windows", "1", "--json").json
    assert found.keys() >= KEYS
    assert found["ppl"] > 1
    assert found["kld_mean"] is None


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--data", "/nowhere/data.txt"], 1, "/nowhere/data.txt: cannot be read"),
        (["--ctx", "1000000"], 1, "less than one window of 1000000"),
        (["--ctx", "2"], 2, "--ctx 2 is too small"),
        (["--max-windows", "0"], 2, "--max-windows 0"),
        (["--ctx", "4096"], 1, "exceed its context of"),
        (["--reference", "/nowhere"], 1, "/nowhere: no such file or folder"),
    ],
)
def test_bad_options_are_named(
    options: list[str], code: int, message: str, cli: Callable, gguf_file: Path
) -> None:
    found = cli("eval", gguf_file, *options)
    assert (found.code, found.out) == (code, "")
    assert message in found.err
    assert found.err.count("\n") == 1


def test_other_files_are_no_artifacts(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a model")
    found = cli("eval", tmp_path / "notes.txt")
    assert (found.code, found.out) == (1, "")
    assert "give a checkpoint folder or a .gguf file" in found.err
