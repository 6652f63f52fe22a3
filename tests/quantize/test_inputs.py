"""Inputs of a stage between their moments and their outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_quant.quantize.inputs import Inputs, Narrow, batches_of
from qwen_quant.quantize.parallel import FEW


@given(st.integers(0, 2**32 - 1), st.integers(-36, 36), st.integers(1, 40))
def test_half_the_memory_loses_a_2048th(seed: int, exponent: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(3, n, generator=generator).exp() * 10.0**exponent
    )  # the smallest a millionth of the largest
    x[:, ::2] *= -1
    kept = Narrow.of(x)
    bound = x.abs() / 2048 + x.abs().amax(-1, keepdim=True) / (1 << 25)
    assert kept.values.dtype == torch.float16
    assert bool(((kept.wide() - x).abs() <= bound).all())


@pytest.mark.parametrize("value", [0.0, 1e-45, 3e38])
def test_rows_of_extreme_values(value: float) -> None:
    x = torch.tensor([[value, 0.0], [-value, value]])
    torch.testing.assert_close(Narrow.of(x).wide(), x, rtol=1e-3, atol=1e-44)


@pytest.mark.parametrize("narrow", [True, False])
def test_outputs_are_the_same_whether_inputs_are_kept(narrow: bool) -> None:
    hidden = torch.randn(7, 200, 8)
    outputs = []
    for keep in (True, False):
        stage = Inputs(torch.sin, batches_of(hidden), keep, narrow=narrow)
        read = torch.cat([x for x, _ in stage])
        outputs.append(torch.cat(list(stage.outputs(torch.square))))
    assert torch.equal(read, hidden.sin()) and torch.equal(*outputs)
    assert torch.equal(outputs[0], read.square()) != narrow


@pytest.mark.parametrize("threads", [1, 3, FEW + 1])
@pytest.mark.parametrize("keep", [True, False])
def test_batches_on_several_threads_come_in_order(threads: int, keep: bool) -> None:
    """With what is lacking of the first ones, by themselves and with the others."""
    hidden, before = torch.randn(7, 512, 8), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        read = Inputs(torch.sin, batches_of(hidden), keep, lambda number, x: x + number, lacking=4)
        for found in (read, [*read.lacking(), *read.others()]):
            for number, (x, lack) in enumerate(found):
                assert torch.equal(x[0], hidden[number].sin()) and torch.equal(lack, x + number)
        expected = Narrow.of(hidden.sin()).wide().square()
        assert torch.equal(torch.cat(list(read.outputs(torch.square))), expected)
    finally:
        torch.set_num_threads(before)
