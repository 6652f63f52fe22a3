"""Sizes that a grid's groups or blocks do not divide: what becomes of them, and that the user is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.safetensors import SafetensorsFile

CALIBRATION = ["--num-samples", "4", "--seq-len", "64"]
MEASURE = ["--ctx", "64", "--max-windows", "2", "--json"]
DOWN = "model.layers.0.mlp.down_proj."


def by_definition(file: SafetensorsFile, stem: str) -> np.ndarray:
    """The weight [N, K] of 4-bit v1 tensors: scales[g_idx] * (q - (stored zero + 1)), number by number."""
    qweight, qzeros, scales, g_idx = (
        file.read_raw(stem + part) for part in ("qweight", "qzeros", "scales", "g_idx")
    )
    weight = np.zeros((qweight.shape[1], len(g_idx)), dtype=np.float32)
    for n in range(weight.shape[0]):
        for k, group in enumerate(g_idx):
            code = int(qweight[k // 8, n]) >> (4 * (k % 8)) & 15
            zero = (int(qzeros[group, n // 8]) >> (4 * (n % 8)) & 15) + 1
            weight[n, k] = np.float32(scales[group, n]) * np.float32(code - zero)
    return weight


@pytest.mark.parametrize("options", [[], ["--desc-act"], ["--asym", "--no-calibration"]])
def test_a_short_last_group(options: list[str], cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    """96 inputs in groups of 64: a group of 64 and one of 32, as GPTQModel makes and reads it."""
    folder, target = make_model(), tmp_path / "out"
    calibration = [] if "--no-calibration" in options else CALIBRATION
    done = cli("gptq", folder, "-o", target, "--group-size", "64", *options, *calibration)
    assert done.code == 0
    (note,) = (line for line in done.err.splitlines() if line.startswith("note: "))
    assert f"{DOWN}weight and 1 more: 96 inputs, so the last group has 32 instead of 64 columns" in note
    assert "vLLM" in note and note.endswith("--group-size 32 divides")
    file = SafetensorsFile(target / "model.safetensors")
    assert file.read_raw(f"{DOWN}scales").shape == (2, 64)
    assert sorted(file.read_raw(f"{DOWN}g_idx").tolist()) == [0] * 64 + [1] * 32
    assert np.array_equal(Checkpoint(target).read(f"{DOWN}weight"), by_definition(file, DOWN))
    measured = cli("eval", target, "--reference", folder, *MEASURE).json
    assert 0 < measured["kld_mean"] < 1
    if "--desc-act" not in options:
        types = cli("export", target, "-o", tmp_path / "m.gguf", "--json").json["types"]
        assert types[f"{DOWN}weight"] == ("Q4_1" if "--asym" in options else "Q4_0")
        again = cli("eval", tmp_path / "m.gguf", "--reference", target, *MEASURE).json
        assert again["kld_mean"] < 0.01  # the engine rounds activations to 8 bits


def test_short_groups_of_experts(cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    """One note for all of them, beside one for the shared expert."""
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    folder = make_model(
        **moe, architectures=["Qwen2MoeForCausalLM"], model_type="qwen2_moe", head_dim=None,
        shared_expert_intermediate_size=160,
    )  # fmt: skip
    done = cli("gptq", folder, "-o", tmp_path / "out", "--group-size", "64", "--no-calibration")
    assert done.code == 0
    experts, shared = (line for line in done.err.splitlines() if line.startswith("note: "))
    assert "mlp.experts.0.down_proj.weight and 7 more: 96 inputs, so the last group has 32 instead" in experts
    assert "mlp.shared_expert.down_proj.weight and 1 more: 160 inputs" in shared
    file = SafetensorsFile(tmp_path / "out" / "model.safetensors")
    assert file.entries["model.layers.1.mlp.experts.3.down_proj.scales"].shape == (2, 64)


def test_notes_in_json(cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    run = ["--no-calibration", "--json"]
    short = cli("gptq", make_model(), "-o", tmp_path / "a", "--group-size", "64", *run).json["notes"]
    assert len(short) == 1 and "96 inputs" in short[0]
    assert cli("gptq", make_model(), "-o", tmp_path / "b", "--group-size", "32", *run).json["notes"] == []
    chunked = make_model(dual_chunk_attention_config={"chunk_size": 64, "local_size": 16})
    bounded = cli("export", chunked, "-o", tmp_path / "c.gguf", "--type", "F16", *run).json["notes"]
    assert len(bounded) == 1 and "context_length is 65 instead of 512" in bounded[0]
    said = cli("export", chunked, "-o", tmp_path / "c.gguf", "--type", "F16").err
    assert f"note: {bounded[0]}" in said.splitlines()


@pytest.mark.parametrize(("kind", "options"), [("Q4_0", CALIBRATION), ("Q8_0", ["--no-calibration"])])
def test_rows_that_blocks_do_not_fill_stay_at_16_bits(
    kind: str, options: list[str], cli: Callable, make_model: Callable, tmp_path: Path
) -> None:
    folder, target = make_model(intermediate_size=80), tmp_path / "m.gguf"
    done = cli("export", folder, "-o", target, "--type", kind, *options)
    assert done.code == 0 and "2 F16" in done.out
    reason = "(80 columns are not a multiple of 32)"
    assert f"not quantized: {DOWN}weight and 1 more {reason}" in done.err.splitlines()
    assert 0 < cli("eval", target, "--reference", folder, *MEASURE).json["kld_mean"] < 1
    refused = cli("gptq", folder, "-o", tmp_path / "out", "--no-calibration")
    assert refused.code == 1
    assert "gate_proj.weight is [80, 64]; GPTQ packing needs multiples of 32, export to GGUF" in refused.err
    assert not (tmp_path / "out").exists()


def test_dual_chunk_attention_from_end_to_end(cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    """Calibrated and measured on windows longer than a chunk; the key stays in the GPTQ checkpoint."""
    setting = {"chunk_size": 32, "local_size": 8, "original_max_position_embeddings": 48}
    folder, target = make_model(dual_chunk_attention_config=setting), tmp_path / "out"
    assert cli("gptq", folder, "-o", target, "--group-size", "32", *CALIBRATION).code == 0
    assert json.loads((target / "config.json").read_text())["dual_chunk_attention_config"] == setting
    measured = cli("eval", target, "--reference", folder, *MEASURE).json
    assert 0 < measured["kld_mean"] < 1
    folder.joinpath("config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"dual_chunk_attention_config": 3})
    )
    refused = cli("gptq", folder, "-o", tmp_path / "b", *CALIBRATION)
    assert refused.code == 1
    assert refused.err.splitlines()[-1].endswith("dual_chunk_attention_config is 3; it must be an object")
