"""The check that ends `gptq` and `export`, from the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_quant.cli import checking
from qwen_quant.exporters import gptq
from qwen_quant.runtime.gguf import GGUFFile

Make = Callable[..., Path]


def test_a_gptq_checkpoint_holds_its_findings(cli: Callable, make_model: Make, tmp_path: Path) -> None:
    target = tmp_path / "out"
    options = ["--group-size", "32", "--num-samples", "4", "--seq-len", "64"]
    found = cli("gptq", make_model(), "-o", target, *options, "--json").json["check"]
    assert 0 < found["kld_mean"] < 1 and "greedy_tokens" not in found
    whole = json.loads((target / "quantize_config.json").read_text())
    assert whole["meta"]["check"] == found
    assert json.loads((target / "config.json").read_text())["quantization_config"] == whole


def test_a_wrong_gptq_checkpoint_is_not_kept(
    cli: Callable, make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, pack = tmp_path / "out", gptq.pack

    def shifted(tensor: Any, stored_format: str) -> Any:
        packed = pack(tensor, stored_format)
        packed.scales[:] = -packed.scales
        return packed

    monkeypatch.setattr(gptq, "pack", shifted)
    command = ["gptq", make_model(), "-o", target, "--bits", "8", "--group-size", "32", "--no-calibration"]
    outcome = cli(*command)
    assert outcome.code == 1 and not target.exists()
    assert outcome.err.startswith(f"qwen-quant: {target}: diverges from"), outcome.err
    assert cli(*command, "--no-verify").code == 0
    assert "check" not in json.loads((target / "quantize_config.json").read_text())["meta"]


def test_a_file_larger_than_memory_is_kept_unchecked(
    cli: Callable, make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "available_memory", lambda: 1000)
    path = tmp_path / "m.gguf"
    outcome = cli("export", make_model(), "-o", path, "--type", "F16")
    assert outcome.code == 0 and f"note: {path} is not checked: it has" in outcome.err
    metadata = GGUFFile(path).metadata
    assert metadata["qwen_quant.check.tokens"] == 0 and math.isnan(metadata["qwen_quant.check.kld_mean"])


def test_without_a_check_nothing_is_stored(cli: Callable, make_model: Make, tmp_path: Path) -> None:
    found = cli("export", make_model(), "-o", tmp_path / "m.gguf", "--type", "F16", "--no-verify", "--json")
    assert found.json["check"] == {}
    assert not [key for key in GGUFFile(tmp_path / "m.gguf").metadata if "check" in key]
