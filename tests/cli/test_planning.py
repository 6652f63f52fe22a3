"""`--dry-run` and `--max-ram`: nothing is written, the plan is what a run does, refusals come first."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.cli.planning import parse_ram
from qwen_quant.evaluate import selfcheck
from qwen_quant.exporters.gptq import stored_tensors
from qwen_quant.grids import IntGrid
from qwen_quant.quantize import plan, speed, stream
from qwen_quant.quantize.plan import plan_run
from qwen_quant.quantize.plan_beside import measuring
from qwen_quant.quantize.recipe import Recipe

CALIBRATION = ["--num-samples", "4", "--seq-len", "64"]
COMMANDS = pytest.mark.parametrize(
    "command", [["gptq", "--group-size", "32"], ["export", "--type", "Q4_0"], ["export", "--type", "F16"]]
)


@COMMANDS
def test_a_dry_run_says_what_and_writes_nothing(
    command: list[str], cli: Callable, make_model: Callable, tmp_path: Path
) -> None:
    arguments = [command[0], make_model(), "-o", tmp_path / "out", *command[1:], *CALIBRATION]
    before = sorted(tmp_path.rglob("*"))
    plan = cli(*arguments, "--dry-run", "--json").json
    said = cli(*arguments, "--dry-run")
    assert said.code == 0
    assert "nothing is written" in said.out and "memory: about" in said.out and "time: about" in said.out
    assert sorted(tmp_path.rglob("*")) == before
    assert plan["dry_run"] is True
    assert [layer["layer"] for layer in plan["layers"]] == [0, 1]
    assert {"peak_rss_mb", "worst_stage", "seconds", "bytes", "outer_tensors"} <= plan.keys()
    done = cli(*arguments, "--json").json
    assert plan["bytes"] < done["bytes"] < plan["bytes"] + 500_000  # headers, tokenizer, metadata


@COMMANDS
def test_too_little_memory_is_refused_at_once(
    command: list[str], cli: Callable, make_model: Callable, tmp_path: Path
) -> None:
    found = cli(command[0], make_model(), "-o", tmp_path / "out", *command[1:], "--max-ram", "1M")
    assert (found.code, found.out, found.err.count("\n")) == (1, "", 1)
    assert "--max-ram is 1 MB" in found.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["lots", "8X", "-1G", "0G", ""])
def test_a_size_that_is_none(text: str, cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    found = cli("gptq", make_model(), "-o", tmp_path / "out", "--max-ram", text)
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert "--max-ram" in found.err


@pytest.mark.parametrize(
    ("text", "size"), [("8G", 8 * 10**9), ("1.5GB", 15 * 10**8), ("500m", 5 * 10**8), ("2GiB", 2 << 30)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_ram(text) == size


@given(samples=st.integers(1, 300), seq_len=st.integers(2, 9000), more=st.integers(1, 300))
@example(samples=17, seq_len=60, more=1)
@settings(max_examples=50, deadline=None)
def test_more_calibration_never_needs_less(samples: int, seq_len: int, more: int, reference: Path) -> None:
    checkpoint = Checkpoint(reference)
    tensors = stored_tensors(checkpoint, IntGrid(4, 128))
    recipe = Recipe(num_samples=samples, seq_len=seq_len)
    plan = plan_run(checkpoint.spec, tensors, recipe)
    for larger in (replace(recipe, num_samples=samples + more), replace(recipe, seq_len=seq_len + more)):
        other = plan_run(checkpoint.spec, tensors, larger)
        assert other.peak >= plan.peak and other.work.matmul > plan.work.matmul
    assert plan_run(checkpoint.spec, tensors, recipe, keep_activations=False).peak <= plan.peak


def test_other_programs_do_not_change_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting is not work: a machine whose cores are taken away for a while would seem slower by the clock."""

    def waiting(call: Callable) -> Callable:
        def called(*arguments: object, **options: object) -> object:
            time.sleep(0.2)
            return call(*arguments, **options)

        return called

    grids, cpu = {IntGrid(4, 32): 1e6}, torch.device("cpu")
    threads = torch.get_num_threads()
    quiet = speed.measure_speed(grids, cpu)
    for name in ("factorise", "solve"):
        monkeypatch.setattr(speed, name, waiting(getattr(speed, name)))
    loaded = speed.measure_speed(grids, cpu)
    assert torch.get_num_threads() == threads
    assert loaded.factor > quiet.factor / 3 and loaded.solved > quiet.solved / 3


def test_measuring_losses_counts(cli: Callable, make_model: Callable, tmp_path: Path) -> None:
    # 40 layers: gradients are taken of hidden states that are kept at each of them.
    line = ["export", make_model(num_hidden_layers=40), "-o", tmp_path / "out", "--seq-len", "256"]
    line += ["--num-samples", "16", "--no-verify"]
    whole = cli(*line, "--target-bpw", "6", "--max-ram", "1M")
    assert (whole.code, whole.out, whole.err.count("\n")) == (1, "", 1)
    assert "measuring losses, gradients at the head" in whole.err and "fix the types with --type" in whole.err
    assert "measuring losses" not in cli(*line, "--type", "Q4_0", "--max-ram", "1M").err


@pytest.mark.parametrize("form", [["gptq"], ["export"], ["export", "--format", "onnx", "--type", "int4"]])
def test_the_check_counts(
    form: list[str], cli: Callable, make_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfcheck, "WINDOW", 1000)  # whose logits take more than all else of so small a model
    model = make_model(vocab_size=100_000)
    line = [form[0], model, "-o", tmp_path / "out", *form[1:], "--num-samples", "1", "--seq-len", "64"]
    line += ["--group-size", "32"] if form != ["export"] else ["--type", "Q4_0"]
    checked = cli(*line, "--dry-run", "--json").json
    assert checked["worst_stage"] == "checking what was written"
    least = cli(*line, "--dry-run", "--json", "--no-verify").json["peak_rss_mb"]
    refused = cli(*line, "--max-ram", f"{(least + checked['peak_rss_mb']) / 2:.0f}M")
    assert refused.code == 1 and "--no-verify" in refused.err and refused.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@given(samples=st.integers(1, 300), seq_len=st.integers(2, 9000), more=st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_measuring_never_needs_less(samples: int, seq_len: int, more: int, reference: Path) -> None:
    checkpoint = Checkpoint(reference)
    tensors = stored_tensors(checkpoint, IntGrid(4, 128))
    recipe = Recipe(num_samples=samples, seq_len=seq_len)
    need = measuring(checkpoint.spec, tensors, recipe).nbytes
    assert measuring(checkpoint.spec, tensors, replace(recipe, num_samples=samples + more)).nbytes >= need


def test_many_activations_lie_in_files(
    cli: Callable, make_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["export", make_model(), "-o", tmp_path / "out", "--type", "Q4_0", "--no-verify", "--json"]
    line += ["--num-samples", "64", "--seq-len", "256"]
    few = cli(*line, "--dry-run").json
    assert few["spilled_mb"] == 0
    monkeypatch.setattr(plan, "IN_MEMORY", 1 << 20)
    many = cli(*line, "--dry-run").json
    assert many["spilled_mb"] > few["hidden_states_mb"]
    assert "in files beside the output" in cli(*[word for word in line if word != "--json"], "--dry-run").out
    spilled: list[object] = []
    monkeypatch.setattr(stream, "_layers", lambda *arguments: spilled.append(arguments[-1]) or iter(()))
    cli(*line)
    assert spilled == [tmp_path]


def test_little_memory_puts_activations_into_files(reference: Path) -> None:
    spec, recipe = Checkpoint(reference).spec, Recipe(num_samples=512)
    whole = plan_run(spec, stored_tensors(Checkpoint(reference), IntGrid(4, 128)), recipe)
    less = plan.fit(whole, spec, recipe, int(whole.peak) - 1, "model")
    assert less.spill and less.keep_activations and less.peak < whole.peak - whole.hidden_states / 2
    on_device = replace(recipe, device="cuda")
    less = plan.fit(whole, spec, on_device, int(whole.peak) - 1, "model")
    assert not less.spill and not less.keep_activations


def test_gradients_count(reference: Path) -> None:
    checkpoint = Checkpoint(reference)
    tensors, recipe = stored_tensors(checkpoint, IntGrid(4, 128)), Recipe(num_samples=64)
    for spill in (False, True):
        without = plan_run(checkpoint.spec, tensors, recipe, spill=spill)
        found = plan_run(checkpoint.spec, tensors, replace(recipe, output_aware=True), spill=spill)
        assert found.peak >= without.peak and found.work.matmul > without.work.matmul
        assert found.set_aside > without.set_aside
        more = replace(recipe, output_aware=True, num_samples=128)
        assert plan_run(checkpoint.spec, tensors, more, spill=spill).peak >= found.peak


def test_a_backward_pass_that_does_not_fit_is_refused(
    cli: Callable, make_model: Callable, tmp_path: Path
) -> None:
    # A head so large that its gradients need more than all else.
    line = ["gptq", make_model(vocab_size=200_000), "-o", tmp_path / "out", "--group-size", "32"]
    line += ["--num-samples", "2", "--seq-len", "64", "--no-verify", "--output-aware"]
    need = cli(*line, "--dry-run", "--json").json
    assert need["worst_stage"] == "gradients at the head"
    found = cli(*line, "--max-ram", f"{need['peak_rss_mb'] - 50:.0f}M")
    assert (found.code, found.out, found.err.count("\n")) == (1, "", 1)
    assert "gradients at the head" in found.err and not (tmp_path / "out").exists()
