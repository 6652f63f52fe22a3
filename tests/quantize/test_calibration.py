"""Moments: in blocks of rows, of Hessians the lower triangle, whatever the pieces that inputs come in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_quant.quantize import calibration
from qwen_quant.quantize.calibration import Calibration


@settings(max_examples=20, deadline=None)
@given(
    k=st.integers(1, 70),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    block=st.sampled_from([16, 32, 256]),
)
def test_it_is_the_mean_of_the_outer_products(k: int, lengths: list[int], block: int) -> None:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(sum(lengths), k, generator=generator)
    y = torch.randn(sum(lengths), 40, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "BLOCK", block)
        moments = Calibration(k, "here")
        for part, lack in zip(x.split(lengths), y.split(lengths), strict=True):
            moments.add(part, lack)
            mirrored = moments.hessian  # what is read in between changes nothing
            torch.testing.assert_close(mirrored, mirrored.T)
    assert moments.n_tokens == len(x)
    expected = x.double().T @ x.double() / max(len(x), 1)
    torch.testing.assert_close(moments.hessian.double(), expected, rtol=1e-4, atol=1e-5)
    if len(x):
        assert moments.lack is not None
        torch.testing.assert_close(
            moments.lack.double(), y.double().T @ x.double() / len(x), rtol=1e-4, atol=1e-5
        )


@settings(max_examples=10, deadline=None)
@given(
    k=st.integers(1, 70),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    more=st.integers(0, 40),
)
def test_what_is_there_already_is_taken_off(k: int, lengths: list[int], more: int) -> None:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(sum(lengths) + more, k, generator=generator)
    y = torch.randn(sum(lengths), 40, generator=generator)
    weight = torch.randn(40, k, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "BLOCK", 32)
        moments = Calibration(k, "here")
        for part, sought in zip(x[: len(y)].split(lengths), y.split(lengths), strict=True):
            moments.add(part, sought)
        moments.less(weight)
        moments.add(x[len(y) :])
        torch.testing.assert_close(moments.hessian, moments.hessian.T)
    expected = x.double().T @ x.double() / max(len(x), 1)
    torch.testing.assert_close(moments.hessian.double(), expected, rtol=1e-4, atol=1e-5)
    if len(y):
        lack = y.double() - x[: len(y)].double() @ weight.double().T
        assert moments.lack is not None
        torch.testing.assert_close(
            moments.lack.double(), lack.T @ x[: len(y)].double() / len(y), rtol=1e-4, atol=1e-4
        )
