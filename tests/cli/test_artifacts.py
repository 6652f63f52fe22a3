"""`qwen-quant gptq`, `export` and `demo`: what they print and that their artifacts can be measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

CALIBRATION = ["--num-samples", "4", "--seq-len", "64"]
MEASURE = ["--ctx", "64", "--max-windows", "2", "--json"]


@pytest.mark.parametrize(
    "options", [["--sym"], ["--asym", "--bits", "8"], ["--desc-act"], ["--no-calibration"]]
)
def test_gptq_json_contract(options: list[str], cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    folder, target = make_model(), tmp_path / "out"
    calibration = [] if "--no-calibration" in options else CALIBRATION
    found = cli("gptq", folder, "-o", target, "--group-size", "32", "--json", *options, *calibration).json
    assert found["output"] == str(target)
    assert found["bytes"] == sum(file.stat().st_size for file in target.iterdir())
    stored = json.loads((target / "config.json").read_text())["quantization_config"]
    assert stored["bits"] == (8 if "--bits" in options else 4)
    assert stored["sym"] is ("--asym" not in options)
    measured = cli("eval", target, "--reference", folder, *MEASURE).json
    assert 0 < measured["kld_mean"] < 1


@pytest.mark.parametrize(
    "options", [["--type", "F16"], ["--type", "Q8_0"], ["--type", "Q4_1", "--no-calibration"]]
)
def test_export_json_contract(
    options: list[str], cli: Callable, make_model: Callable, tmp_path: Path
) -> None:
    folder, target = make_model(), tmp_path / "out.gguf"
    found = cli("export", folder, "-o", target, "--json", *options, *CALIBRATION).json
    assert found["output"] == str(target)
    assert found["bytes"] == target.stat().st_size
    assert found["types"]["model.layers.0.mlp.up_proj.weight"] == options[1]
    measured = cli("eval", target, "--reference", folder, *MEASURE).json
    assert 0 <= measured["kld_mean"] < 1
    assert len(cli("run", target, "-p", "one", "--raw", "-n", "3", "--json").json["tokens"]) == 3


def test_only_a_checkpoint_is_overwritten(cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    target = tmp_path / "out"
    arguments = ["gptq", make_model(), "-o", target, "--group-size", "32", "--no-calibration"]
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    for options in ([], ["--overwrite"]):
        refused = cli(*arguments, *options)
        assert refused.code == 1
        assert f"{target}: is not empty" in refused.err
        assert [path.name for path in target.iterdir()] == ["mine.txt"]
    (target / "mine.txt").unlink()
    assert cli(*arguments).code == 0
    before = (target / "config.json").stat().st_ino
    assert cli(*arguments).code == 1
    assert (target / "config.json").stat().st_ino == before
    assert cli(*arguments, "--overwrite").code == 0
    assert (target / "config.json").stat().st_ino != before


def test_demo_json_contract(cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    folder = make_model(hidden_size=128, intermediate_size=128, num_hidden_layers=1)
    found = cli("demo", folder, "--json", "--keep", tmp_path / "kept", "-t", "1").json
    assert [row["format"] for row in found["rows"]] == [
        "BF16",
        "int8 GPTQ",
        "int4 GPTQ",
        "Q4_0 GGUF",
        "Q4_K_M GGUF",
    ]
    assert found["rows"][0]["kld_mean"] == 0
    assert all({"bytes", "ppl", "kld_mean", "tg_tok_s"} <= row.keys() for row in found["rows"])
    assert isinstance(found["text"], str)
    assert list((tmp_path / "kept").glob("*.gguf"))
