"""Every tensor of a checkpoint is in the summary: with its type, or with the reason why it is left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.checkpoints import rewrite

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.safetensors import SafetensorsFile

STRAYS = {f"visual.blocks.{i}.weight": np.zeros((4, 4), dtype=np.float32) for i in range(5)}
EXPLAINED = {
    "lm_head.weight": np.zeros((4112, 64), dtype=np.float32),
    "model.layers.0.self_attn.q_proj.bias": np.zeros(128, dtype=np.float32),
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(16, dtype=np.float32),
}


@pytest.mark.parametrize(
    "command",
    [
        ["gptq", "--group-size", "32"],
        ["export", "--type", "Q4_0"],
        ["export", "--format", "onnx", "--type", "int4", "--group-size", "32", "--no-verify"],
    ],
    ids=["gptq", "gguf", "onnx"],
)
def test_every_tensor_is_accounted_for(
    command: list[str], cli: Callable, make_model: Callable, tmp_path: Path
) -> None:
    folder = make_model()
    rewrite(folder, STRAYS | EXPLAINED)
    arguments = [command[0], folder, *command[1:], "--no-calibration"]
    summary = cli(*arguments, "-o", tmp_path / "json", "--json").json
    assert summary["left_out"].keys() == STRAYS.keys() | EXPLAINED.keys()
    stored = SafetensorsFile(folder / "model.safetensors").entries
    assert summary["types"].keys() | summary["left_out"].keys() == stored.keys()
    [note] = [note for note in summary["notes"] if "left out" in note]
    said = cli(*arguments, "-o", tmp_path / "text")
    assert said.code == 0
    assert f"note: {note}\n" in said.err
    assert "5 tensors" in note and "visual.blocks.0.weight" in note and "and 2 more" in note


def test_parts_of_a_quantized_checkpoint_are_known(
    cli: Callable, make_model: Callable, tmp_path: Path
) -> None:
    assert (
        cli("gptq", make_model(), "-o", tmp_path / "int4", "--group-size", "32", "--no-calibration").code == 0
    )
    found = Checkpoint(tmp_path / "int4").left_out
    assert found == {"lm_head.weight": "config.json ties the head to the embedding"}
