"""`qwen-quant export --format onnx`, and `run` and `eval` on what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_quant.exporters.onnx_fused import FusedOps
from qwen_quant.runtime.session import Session

CALIBRATION = ["--num-samples", "4", "--seq-len", "64"]
MEASURE = ["--ctx", "64", "--max-windows", "2", "--json"]


def test_from_full_precision(cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    folder, target = make_model(), tmp_path / "out"
    options = ["--type", "int4", "--group-size", "32", "--asym"]
    found = cli("export", folder, "-o", target, "--format", "onnx", "--json", *options, *CALIBRATION).json
    assert found["output"] == str(target)
    assert found["bytes"] >= sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) - 4096
    assert found["types"]["model.layers.0.mlp.up_proj.weight"] == "int4-g32-asym"
    assert found["types"]["model.embed_tokens.weight"] == "int4-g32"
    assert 0 < found["check"]["kld_mean"] < 1
    assert len(found["layers"]) == 15 and all(
        layer["error"] <= layer["rtn_error"] for layer in found["layers"]
    )
    assert "recipe" in found and found["recipe"]["num_samples"] == 4
    measured = cli("eval", target, "--reference", folder, *MEASURE).json
    assert 0 < measured["kld_mean"] < 1
    answer = cli("run", target, "-p", "Hello", "-n", 5, "--raw", "--json").json
    assert 0 < len(answer["tokens"]) <= 5
    assert cli("export", folder, "-o", target, "--format", "onnx").code == 1
    again = cli(
        "export", folder, "-o", target, "--format", "onnx", "--overwrite", "--no-verify", "--json"
    ).json
    assert again["check"] == {} and again["types"]["model.embed_tokens.weight"] == "F16"
    assert [path.name for path in (target / "onnx").glob("*.onnx")] == ["model_fp16.onnx"]


@pytest.mark.parametrize("options", [["--type", "F16"], ["--type", "F32", "--opset", "23"]])
def test_graphs_of_floats_are_evaluated(
    options: list[str], cli: Callable, make_model: Callable, tmp_path: Path
) -> None:
    folder, target = make_model(), tmp_path / "out"
    assert cli("export", folder, "-o", target, "--format", "onnx", "--no-verify", *options).code == 0
    assert cli("eval", target, "--reference", folder, *MEASURE).json["kld_mean"] < 1e-4
    texts = [
        cli("run", path, "-p", "Hello", "-n", 5, "--raw", "--json").json["tokens"]
        for path in (folder, target)
    ]
    assert texts[0] == texts[1]


def test_from_gptq(cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    folder, gptq, target = make_model(), tmp_path / "gptq", tmp_path / "out"
    assert cli("gptq", folder, "-o", gptq, "--group-size", "32", *CALIBRATION).code == 0
    outcome = cli("export", gptq, "-o", target, "--format", "onnx", "--accuracy-level", "0")
    assert outcome.code == 0, outcome.err
    assert "checked on" in outcome.out and "int4-g32" in outcome.out
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    properties = (target / "README.md").read_text()
    assert '"num_samples": 4' in properties
    ours, theirs = (cli("eval", path, "--reference", folder, *MEASURE).json for path in (target, gptq))
    assert ours["kld_mean"] == pytest.approx(theirs["kld_mean"], rel=0.02)


def test_a_failed_check_is_one_line(
    cli: Callable, make_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, target = make_model(), tmp_path / "out"
    monkeypatch.setattr(FusedOps, "gated", lambda ops, gate, up: gate)
    outcome = cli("export", folder, "-o", target, "--format", "onnx", "--json")
    assert outcome.code == 1
    assert outcome.err.startswith(f"qwen-quant: {target}: diverges from {folder}"), outcome.err
    assert len(outcome.err.strip().splitlines()) == 1 and not target.exists()
    assert cli("export", folder, "-o", target, "--format", "onnx", "--no-verify").code == 0


def test_a_plan_writes_nothing(cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    target = tmp_path / "out"
    command = [
        "export",
        make_model(),
        "-o",
        target,
        "--format",
        "onnx",
        "--type",
        "int4",
        "--dry-run",
        "--json",
    ]
    plan = cli(*command).json
    assert plan and not target.exists()


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (
            ["--type", "Q4_0"],
            2,
            "--type Q4_0: not an ONNX type of ours; choose one of F32, F16, BF16, int4, int8",
        ),
        (["--opset", "17"], 2, "--opset 17: not supported"),
        (["--accuracy-level", "1"], 2, "--accuracy-level 1: choose 0, 4 or auto"),
        (["--group-size", "48", "--type", "int4"], 2, "--group-size 48"),
        (["--token-embedding-type", "int8", "--output-tensor-type", "F16"], 2, "are one tensor"),
    ],
)
def test_options_that_cannot_be(
    cli: Callable, make_model: Callable, tmp_path: Path, options: list[str], code: int, word: str
) -> None:
    outcome = cli("export", make_model(), "-o", tmp_path / "out", "--format", "onnx", *options)
    assert outcome.code == code and word in outcome.err, outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_quantized_cache(cli: Callable, tmp_path: Path) -> None:
    arguments = ["export", "reference", "--format", "onnx", "--type", "F32", "--seq-len", "64"]
    target = tmp_path / "out"
    done = cli(*arguments, "-o", target, "--kv-cache", "int8", "--json")
    assert done.code == 0, done.err
    assert done.json["check"]["kld_mean"] < 0.01
    assert Session.open(target).engine.kv_bytes_per_token == 4 * 2 * 2 * 64
    found = cli(*arguments, "-o", tmp_path / "other", "--kv-cache", "auto")
    assert found.code == 2
    assert "--kv-cache auto: ONNX's attention has int8 or int4 in all layers" in found.err
