"""`qwen-quant kv`, and --kv-cache of the commands that store or use what it finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.grids.kv_file import read_kv_file
from qwen_quant.runtime.gguf import GGUFFile
from qwen_quant.safetensors import SafetensorsFile

FEW = ["--num-samples", "2", "--seq-len", "64"]


@pytest.fixture
def layout(cli: Callable, tmp_path: Path) -> Path:
    path = tmp_path / "layout.safetensors"
    assert cli("kv", "reference", "-o", path, *FEW).code == 0
    return path


def test_it_is_small_and_says_what_it_chose(cli: Callable, tmp_path: Path) -> None:
    path = tmp_path / "layout.safetensors"
    found = cli("kv", "reference", "-o", path, *FEW, "--json").json
    assert found["kv_bytes_per_token"] <= 0.30 * 4 * 2 * 2 * 64 * 2
    assert found["kv_recent_bytes"] == 64 * 4 * 2 * 2 * 64 * 2
    assert found["kld"] < 0.05
    bits = [(layer["key_bits"], layer["value_bits"]) for layer in found["layers"]]
    costs = [cost for layer in found["layers"] for cost in (layer["key_kld"], layer["value_kld"])]
    flat = [b for pair in bits for b in pair]
    assert flat.count(8) == 1
    assert flat.index(8) == int(np.argmax(costs))
    record = json.loads(SafetensorsFile(path).metadata["qwen_quant.kv_cache"])
    assert record["layers"] == found["layers"]


def test_a_larger_budget_buys_int8(cli: Callable, tmp_path: Path) -> None:
    found = cli("kv", "reference", "-o", tmp_path / "l", *FEW, "--kv-bits-budget", "8.25", "--json").json
    assert all(layer["key_bits"] == layer["value_bits"] == 8 for layer in found["layers"])


def test_dangerous_layers_show_in_the_weights(cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    folder = make_model(architectures=["Qwen2ForCausalLM"], model_type="qwen2", head_dim=None)
    path = folder / "model.safetensors"
    file = SafetensorsFile(path)
    entry = file.entries["model.layers.1.self_attn.k_proj.bias"]
    data = bytearray(path.read_bytes())
    large = np.full(entry.shape, 256.0, dtype=np.float32).view(np.uint32) >> 16
    data[entry.offset : entry.offset + entry.nbytes] = large.astype(np.uint16).tobytes()
    path.write_bytes(data)
    found = cli("kv", folder, "-o", tmp_path / "l", *FEW)
    assert found.code == 0, found.err
    assert "1 !" in found.out
    assert "0 !" not in found.out
    assert "note: layer 1: the key bias (norm 1448) is" in found.err
    assert "layer 0" not in found.err


def test_export_stores_it_and_run_uses_it(cli: Callable, layout: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    assert cli("export", "reference", "-o", target, "--type", "F16", "--kv-cache", layout).code == 0
    stored = GGUFFile(target).metadata
    spec, _ = read_kv_file(layout, 4, 2, 64)
    assert stored["qwen_quant.kv_cache.key_bits"] == [layer.keys.grid.bits for layer in spec.layers]
    found = cli(
        "eval",
        target,
        "--reference",
        target,
        "--kv-cache",
        "auto",
        "--ctx",
        "128",
        "--max-windows",
        "2",
        "--json",
    ).json
    assert found["kv_cache"] == "auto"
    assert found["kv_bytes_per_token"] == spec.bytes_per_token(2, 64)
    assert 0 < found["kld_mean"] < 0.05
    answer = cli("run", target, "-p", "The", "-n", "3", "--kv-cache", "auto", "-ctv", "int8", "--raw")
    assert answer.code == 0, answer.err


def test_gptq_leaves_it_in_the_folder(cli: Callable, layout: Path, tmp_path: Path) -> None:
    target = tmp_path / "int4"
    done = cli("gptq", "reference", "-o", target, "--no-calibration", "--kv-cache", layout)
    assert done.code == 0, done.err
    found = cli("eval", target, "--kv-cache", "auto", "--ctx", "64", "--max-windows", "1", "--json").json
    assert found["kv_bytes_per_token"] == read_kv_file(layout, 4, 2, 64)[0].bytes_per_token(2, 64)
    assert Checkpoint(target).quantization is not None


def test_layouts_are_measured_on_a_folder(cli: Callable) -> None:
    arguments = [
        "eval",
        "reference",
        "--reference",
        "reference",
        "--ctx",
        "128",
        "--max-windows",
        "2",
        "--json",
    ]
    kld, size = {}, {}
    for name in ("f16", "int8", "int4", "kivi4", "qwen1"):
        found = cli(*arguments, "--kv-cache", name).json
        kld[name], size[name] = found["kld_mean"], found["kv_bytes_per_token"]
    assert kld["f16"] < 1e-5
    assert kld["int8"] < 5e-4
    assert kld["int8"] < kld["qwen1"] < kld["int4"] < 0.1
    assert size == {"f16": 2048, "int8": 1056, "int4": 544, "kivi4": 640, "qwen1": 1088}


def test_needles_are_found_or_not(cli: Callable) -> None:
    arguments = ["eval", "reference", "--ctx", "128", "--max-windows", "1", "--needle", "--json"]
    found = cli(*arguments).json
    assert list(found["retrieval"]) == list(found["retrieval_gain"]) == ["0", "0.25", "0.5", "0.75"]
    assert all(0 <= share <= 1 for share in found["retrieval"].values())
    assert all(gain > 0.2 for gain in found["retrieval_gain"].values())  # nats: it copies a little
    rounded = cli(*arguments, "--kv-cache", "int8").json["retrieval_gain"]
    assert list(rounded.values()) == pytest.approx(list(found["retrieval_gain"].values()), abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["kv", "reference", "-o", "l", "--kv-cache", "fp8"], 2, "--kv-cache fp8: choose int4, int8, auto"),
        (["kv", "reference", "-o", "l", "--kv-bits-budget", "3", *FEW], 2, "int4 takes 4.25 bits"),
        (["eval", "reference", "--kv-cache", "auto"], 1, "kv_cache.safetensors: cannot be read"),
        (["eval", "reference", "--kv-cache", "fp8"], 2, "--kv-cache fp8: unknown"),
        (["eval", "reference", "--needle", "--ctx", "32"], 2, "--needle needs windows of 96"),
    ],
)
def test_bad_options_are_named(
    arguments: list[str],
    code: int,
    message: str,
    cli: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    found = cli(*arguments)
    assert (found.code, found.out) == (code, "")
    assert message in found.err
    assert found.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_gguf_file_has_the_engines_types(cli: Callable, gguf_file: Path) -> None:
    found = cli("eval", gguf_file, "--kv-cache", "qwen1")
    assert found.code == 2
    assert "a GGUF file runs with f16, int8, int4, auto" in found.err
    found = cli("run", gguf_file, "-p", "x", "-ctk", "auto")
    assert (found.code, found.out) == (1, "")
    assert "holds no calibrated layout of the KV cache" in found.err
