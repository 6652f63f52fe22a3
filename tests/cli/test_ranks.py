"""Several processes calibrate together: the same bytes for any number of them, and one line when one fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import rewrite
from helpers.ranks import PIECES, SABOTAGE, start

from qwen_quant.quantize.ranks import each_on_its_rank, own_part, shares

CALIBRATION = ["--num-samples", "9", "--seq-len", "64", "--json"]
MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "head_dim": None,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 96,
    "tie_word_embeddings": False,
}
GPTQ = ["gptq", "--group-size", "32"]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces of `start` in this process."""
    for (module, name), value in PIECES.items():
        monkeypatch.setattr(module, name, value)


def test_alone_all_pieces_are_here() -> None:
    items = list(range(5))
    assert list(each_on_its_rank(lambda x: x + 1, items)) == [1, 2, 3, 4, 5]
    assert own_part(items) == items and shares(items) == [items]


@pytest.mark.parametrize(
    ("model", "command", "count"),
    [
        ({}, GPTQ, 3),
        ({"num_hidden_layers": 1}, [*GPTQ, "--output-aware"], 2),
        (MOE, ["export", "--target-bpw", "6"], 2),
    ],
    ids=["dense", "output-aware", "experts-and-budget"],
)
def test_the_same_bytes(
    model: dict,
    command: list[str],
    count: int,
    cli: Callable,
    make_model: Callable,
    tmp_path: Path,
    small_pieces: None,
) -> None:
    line = [*command, str(make_model(**model)), *CALIBRATION]
    alone = cli(*line, "-o", tmp_path / "alone").json
    first, *others = [
        rank.end() for rank in start(count, [*line, "-o", str(tmp_path / "together")], tmp_path / "ranks")
    ]
    assert first[0] == 0, first
    assert others == [(0, "", "")] * (count - 1)
    assert json.loads(first[1])["layers"] == alone["layers"]
    name = "model.safetensors" if command[0] == "gptq" else ""
    assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_torchrun(cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    line = [*GPTQ, str(make_model()), *CALIBRATION]
    cli(*line, "-o", tmp_path / "alone")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "qwen_quant.cli", *line, "-o", str(tmp_path / "together")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] > 0
    name = "model.safetensors"
    assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize("sabotage", SABOTAGE)
def test_one_that_fails_ends_all_with_one_line(sabotage: str, make_model: Callable, tmp_path: Path) -> None:
    line = [*GPTQ, str(make_model()), *CALIBRATION, "-o", str(tmp_path / "out")]
    first, second = [rank.end() for rank in start(2, line, tmp_path / "ranks", sabotage)]
    assert (first[0], first[1], first[2].count("\n")) == (1, "", 1), first
    assert ("has ended" if sabotage == "killed" else "the second one failed") in first[2]
    assert second == (-signal.SIGKILL if sabotage == "killed" else 0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "ranks"]


def test_a_mistake_is_told_once(make_model: Callable, tmp_path: Path) -> None:
    line = [*GPTQ, str(make_model()), "--bits", "5", "-o", str(tmp_path / "out")]
    first, second = [rank.end() for rank in start(2, line, tmp_path / "ranks")]
    assert first[0] == 2 and first[2].count("\n") == 1
    assert second == (0, "", "")


def test_what_all_find_is_told_once(make_model: Callable, tmp_path: Path) -> None:
    """Each rank sees that activations are not finite, while results are handed round."""
    folder = make_model()
    large = np.random.default_rng(0).choice([-3e5, 3e5], (96, 64)).astype(np.float32)
    changed = {f"model.layers.0.mlp.{name}.weight": large for name in ("gate_proj", "up_proj")}
    changed["model.layers.0.post_attention_layernorm.weight"] = np.full(64, 1e14, dtype=np.float32)
    rewrite(folder, changed)
    line = [*GPTQ, str(folder), *CALIBRATION, "-o", str(tmp_path / "out")]
    first, second = [rank.end() for rank in start(2, line, tmp_path / "ranks")]
    assert first[0] == 1 and first[2].count("\n") == 1 and "down_proj: activations" in first[2]
    assert second[1:] == ("", "")


def test_what_was_interrupted_goes_on_alone(
    cli: Callable, make_model: Callable, tmp_path: Path, small_pieces: None
) -> None:
    line = [*GPTQ, str(make_model(num_hidden_layers=4)), *CALIBRATION]
    cli(*line, "-o", tmp_path / "whole")
    kept = tmp_path / ".out.layers"
    ranks = start(2, [*line, "-o", str(tmp_path / "out"), "--resume"], tmp_path / "ranks")
    while not list(kept.glob("layer-*")) and ranks[0].process.is_alive():
        time.sleep(0.005)
    for rank in ranks:
        assert rank.process.pid is not None
        os.kill(rank.process.pid, signal.SIGINT)
    assert [rank.end() for rank in ranks] == [(1, "", "qwen-quant: interrupted\n"), (1, "", "")]
    assert list(kept.glob("layer-*"))
    assert cli(*line, "-o", tmp_path / "out", "--resume").code == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
