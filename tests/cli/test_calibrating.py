"""What is said of a solve that did not go as usual."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_quant.cli.calibrating import print_notes
from qwen_quant.quantize.layer import LinearReport, QuantizedLayer


def test_fallbacks_are_named_one_by_one_and_notes_together(capsys: pytest.CaptureFixture[str]) -> None:
    def report(layer: int, name: str, **said: str) -> LinearReport:
        return LinearReport(f"model.layers.{layer}.{name}.weight", "Q4_0", 0.1, 0.2, 0.01, 30, **said)

    few = "rank-deficient, 30 tokens for 96 inputs: more --num-samples help"
    layers = [
        QuantizedLayer(0, reports=[report(0, "mlp.up_proj", fallback="inputs are all zero: rounded")]),
        QuantizedLayer(1, reports=[report(1, "mlp.up_proj"), report(1, "mlp.down_proj", note=few)]),
        QuantizedLayer(2, reports=[report(2, "mlp.down_proj", note=few)]),
    ]
    print_notes(layers, {"lm_head.weight": "kept"})
    assert capsys.readouterr().err.splitlines() == [
        "warning: model.layers.0.mlp.up_proj.weight: inputs are all zero: rounded",
        f"note: model.layers.1.mlp.down_proj.weight and 1 more ({few})",
        "not quantized: lm_head.weight (kept)",
    ]


def test_what_output_aware_leaves_out(cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }
    sparse = make_model(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", **experts)
    line = ["export", sparse, "-o", tmp_path / "out", "--type", "Q4_0", "--output-aware"]
    assert "experts are solved without it" in cli(*line, "--dry-run").err
    found = cli(*line, "--no-calibration")
    assert (found.code, found.err.count("\n")) == (2, 2), found.err
    assert "--output-aware" in found.err.splitlines()[-1]
