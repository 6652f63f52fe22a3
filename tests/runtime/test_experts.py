"""Experts on the engine: the choice, products of every type, steps in pieces, and files that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.isas import is_exact

from qwen_quant import _core
from qwen_quant.errors import FormatError
from qwen_quant.runtime.session import Session

TinyModels = Callable[..., Any]
TOKENS = np.random.default_rng(3).integers(0, 96, 70).astype(np.int32)
FAMILIES = pytest.mark.parametrize("architecture", ["qwen2moe", "qwen3moe"])
each_isa = pytest.mark.parametrize("isa", _core.cpu_isas())


@pytest.mark.parametrize(("count", "used"), [(1, 1), (8, 3), (60, 4), (128, 8), (7, 7)])
@pytest.mark.parametrize("normalize", [False, True])
def test_choice_is_softmax_and_topk(count: int, used: int, normalize: bool) -> None:
    for seed in range(20):
        logits = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 3
        weights, expected = torch.softmax(logits, -1).topk(used)
        experts, found = _core.choose_experts(logits.tolist(), used, normalize)
        assert experts == expected.tolist()
        np.testing.assert_allclose(found, weights / weights.sum() if normalize else weights, rtol=1e-5)


def test_of_equals_the_lower_index_is_chosen() -> None:
    assert _core.choose_experts([1.0, 2.0, 2.0, 1.0, 2.0, 1.0], 4, True)[0] == [1, 2, 4, 0]


def test_nan_is_never_hidden() -> None:
    experts, weights = _core.choose_experts([1.0, float("nan"), 3.0, 2.0], 2, True)
    assert len(set(experts)) == 2
    assert np.isnan(weights).all()


@each_isa
@FAMILIES
@pytest.mark.parametrize("tensor_type", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_logits_equal_transformers(
    tiny_model: TinyModels, architecture: str, tensor_type: str, isa: str
) -> None:
    model = tiny_model(architecture, tensor_type)
    gaps = np.abs(
        Session.open(model.path, isa=isa, n_threads=2).logits(TOKENS) - model.reference_logits(TOKENS)
    )
    if is_exact(tensor_type, isa):
        assert np.median(gaps) < 3e-4
        assert gaps.max() < 3e-3
    else:  # int8 or BF16 activations, which now and then lead to another expert
        assert np.median(gaps) < 0.08
        assert np.quantile(gaps.max(axis=1), 0.9) < 0.5


@each_isa
@FAMILIES
@pytest.mark.parametrize("tensor_type", ["F16", "Q4_0", "Q8_0"])
def test_steps_threads_and_chunks_change_nothing(
    tiny_model: TinyModels, architecture: str, tensor_type: str, isa: str
) -> None:
    path = tiny_model(architecture, tensor_type).path
    expected = Session.open(path, isa=isa, n_threads=1).logits(TOKENS)
    other = Session.open(path, isa=isa, n_threads=3)
    np.testing.assert_array_equal(other.prefill(TOKENS[:40]), expected[39])
    for position in range(40, len(TOKENS)):
        np.testing.assert_array_equal(other.step(int(TOKENS[position])), expected[position])


def test_odd_shapes(tiny_model: TinyModels) -> None:
    """Rows that fill no unit, all experts in use, no bias."""
    model = tiny_model(
        "qwen2moe", "F32", num_experts=5, num_experts_per_tok=5, moe_intermediate_size=40,
        shared_expert_intermediate_size=24, qkv_bias=False,
    )  # fmt: skip
    gaps = np.abs(Session.open(model.path, n_threads=3).logits(TOKENS) - model.reference_logits(TOKENS))
    assert gaps.max() < 3e-3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"expert_used_count\x04\0\0\0\x03", b"expert_used_count\x04\0\0\0\x09",
         "expert_used_count': 9 is more than the 8 experts"),
        (b"expert_count\x04\0\0\0\x08", b"expert_count\x04\0\0\0\0", "expert_count': 0 is out of range"),
        (b"expert_count\x04\0\0\0\x08", b"expert_count\x04\0\0\0\x07",
         r"ffn_gate_inp\.weight': has shape \[8, 128\], the configuration asks for \[7, 128\]"),
        (b"expert_feed_forward_length\x04\0\0\0\x60", b"expert_feed_forward_length\x04\0\0\0\x40",
         r"ffn_gate_exps\.weight': has shape \[8, 96, 128\]"),
        (b"blk.1.ffn_up_exps", b"blk.1.ffn_uq_exps", r"'blk\.1\.ffn_up_exps\.weight': missing"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(
    tiny_model: TinyModels, tmp_path: Path, old: bytes, new: bytes, message: str
) -> None:
    data = tiny_model("qwen3moe", "Q4_0").path.read_bytes()
    assert old in data
    path = tmp_path / "odd.gguf"
    path.write_bytes(data.replace(old, new))
    with pytest.raises(FormatError, match=message) as error:
        Session.open(path)
    assert "\n" not in str(error.value)
