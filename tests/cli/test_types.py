"""`export`'s types: llama-quantize's names and options, and budgets of bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_quant.errors import CalibrationError
from qwen_quant.quantize import sensitivity, stream

CALIBRATION = ["--num-samples", "4", "--seq-len", "64"]
DOWN = "model.layers.1.mlp.down_proj.weight"


def test_a_mix_with_a_tensor_of_its_own(cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    options = [
        "--type",
        "q4_k_m",
        "--tensor-type",
        r"blk\.1\.ffn_down=q5_1",
        "--token-embedding-type",
        "bf16",
    ]
    found = cli("export", make_model(), "-o", tmp_path / "m.gguf", *options, *CALIBRATION, "--json").json
    assert found["types"][DOWN] == "Q5_1"
    # Rows of 64 weights are no super-blocks.
    assert found["types"]["model.layers.0.mlp.up_proj.weight"] == "Q5_0"
    assert found["types"]["model.embed_tokens.weight"] == "BF16"
    assert {layer["grid"] for layer in found["layers"]} == {"Q5_0", "Q5_1", "Q8_0"}


@pytest.mark.parametrize("tied", [True, False])
def test_a_budget_is_kept(cli: Callable, make_model: Callable, tmp_path: Path, tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    weights = None
    for bits in ("5.5", "7"):
        options = ["export", model, "-o", tmp_path / "m.gguf", "--target-bpw", bits, *CALIBRATION]
        plan = cli(*options, "--dry-run", "--json").json
        tensors = [t for layer in plan["layers"] for t in layer["tensors"]] + plan["outer_tensors"]
        count = sum(8 * t["bytes"] / t["bits_per_weight"] for t in tensors)
        assert 0.85 * float(bits) < 8 * plan["bytes"] / count <= float(bits)
        assert weights is None or plan["expected_kld"] < weights
        weights = plan["expected_kld"]
    done = cli(*options, "--json").json
    planned = {t["name"]: t["stored_as"] for t in tensors}
    assert done["types"] == planned
    assert done["recipe"]["expected_kld"] == plan["expected_kld"]


def test_a_file_of_a_size(cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    command = ["export", make_model(), "-o", tmp_path / "m.gguf", *CALIBRATION, "--json"]
    size = cli(*command, "--target-bpw", "6").json["bytes"]
    done = cli(*command, "--target-size", f"{size}").json
    assert 0.95 * size < done["bytes"] <= size
    asked = cli(*command, "--target-size", f"{size}", "--tensor-type", "ffn_down=Q8_0").json
    assert asked["types"][DOWN] == "Q8_0" and asked["bytes"] <= size


def test_measured_losses_are_kept(
    cli: Callable, make_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    line = ["export", model, "--target-bpw", "6", *CALIBRATION]
    assert cli(*line, "-o", tmp_path / "whole").code == 0

    def fail(*_: object, **__: object) -> None:
        raise CalibrationError("stopped here")

    with monkeypatch.context() as broken:
        broken.setattr(stream, "_layers", fail)
        assert cli(*line, "-o", tmp_path / "out", "--resume").code == 1
    assert [path.name for path in (tmp_path / ".out.layers").iterdir()] == ["losses.json"]
    with monkeypatch.context() as broken:
        broken.setattr(sensitivity, "_measured", fail)
        other = cli(*line, "--seed", "1", "-o", tmp_path / "out", "--resume")
        assert other.code == 1 and "was begun with another recipe" in other.err
        assert cli(*line, "-o", tmp_path / "out", "--resume").code == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "whole"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-bpw", "1"], "too small"),
        (["--target-size", "10K"], "too small"),
        (["--target-bpw", "0"], "must lie between 0 and 16"),
        (["--target-size", "small"], "--target-size small: must be a size"),
        (["--target-bpw", "5", "--target-size", "1G"], "give one of them"),
        (["--target-bpw", "5", "--type", "Q4_K_M"], "--type fixes the types that --target-bpw would choose"),
        (["--target-size", "1M", "--pure"], "--pure fixes"),
        (["--target-bpw", "5", "--no-calibration"], "drop --no-calibration"),
        (["--tensor-type", "ffn_down"], "must be NAME=TYPE"),
        (["--type", "Q4_K_XL"], "--type Q4_K_XL: not supported; choose one of F32"),
    ],
)
def test_what_cannot_be(
    options: list[str], message: str, cli: Callable, make_model: Callable, tmp_path: Path
) -> None:
    found = cli("export", make_model(), "-o", tmp_path / "m.gguf", *options, *CALIBRATION)
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert message in found.err
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("file_format", "option"),
    [
        ("onnx", ["--target-bpw", "4.5"]),
        ("onnx", ["--pure"]),
        ("gguf", ["--asym"]),
        ("gguf", ["--opset", "23"]),
    ],
)
def test_options_of_another_format_are_refused(
    cli: Callable, make_model: Callable, tmp_path: Path, file_format: str, option: list[str]
) -> None:
    command = ["export", make_model(), "-o", tmp_path / "m", "--format", file_format, *option]
    found = cli(*command)
    assert found.code == 2
    assert f"{option[0]}: belongs to --format" in found.err
    assert not (tmp_path / "m").exists()
