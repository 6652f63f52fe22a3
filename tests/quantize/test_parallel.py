"""Work on several threads: order, exceptions, and the number of threads afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qwen_quant.quantize.parallel import FEW, each_on_few_threads, each_on_its_thread


@pytest.fixture(autouse=True, params=[1, 3, FEW + 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_are_in_order_and_threads_as_before(threads: int) -> None:
    assert each_on_its_thread(lambda x: (x, torch.get_num_threads()), range(7)) == [(x, 1) for x in range(7)]
    assert torch.get_num_threads() == threads


def test_an_exception_comes_through(threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        each_on_its_thread(lambda x: 1 // x, [2, 1, 0, 1])
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_recorded_as_in_the_thread_that_calls(enabled: bool) -> None:
    with torch.set_grad_enabled(enabled):
        assert each_on_its_thread(lambda _: torch.is_grad_enabled(), range(4)) == [enabled] * 4


def test_many_threads_share_each_item(threads: int) -> None:
    expected = 1 if threads <= FEW else threads
    assert each_on_few_threads(lambda _: torch.get_num_threads(), range(4)) == [expected] * 4
