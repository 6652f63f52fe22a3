"""Descent over codes and scales: what it finds is better, and no single step is left that would improve it."""

from __future__ import annotations

import pytest
import torch

from qwen_quant.grids import Q4_0, Q4_1, Q8_0, IntGrid
from qwen_quant.grids.base import AffineGrid
from qwen_quant.grids.iq4 import IQ4_NL, IQ4_XS
from qwen_quant.grids.k_quants import Q2_K, Q3_K, Q4_K, Q6_K
from qwen_quant.quantize import descend
from qwen_quant.quantize.gptq import Solution, solve, solve_stack

GRIDS = [
    IntGrid(4, 32),
    IntGrid(4, 64, sym=False),
    IntGrid(2, 128),
    IntGrid(3, -1),
    Q4_0(),
    Q4_1(),
    Q8_0(),
    Q2_K(),
    Q3_K(),
    Q4_K(),
    Q6_K(),
    IQ4_NL(),
    IQ4_XS(),
]
K = 512


def problem(k: int = K, n: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [n, k] and the Hessian [k, k] of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    x = torch.randn(4 * k, k, generator=generator) @ mix + torch.randn(4 * k, 1, generator=generator)
    return torch.randn(n, k, generator=generator) / k**0.5, x.T @ x / len(x)


def losses(w: torch.Tensor, solution: Solution, hessian: torch.Tensor) -> torch.Tensor:
    """What the solver minimises for each row [N], float64."""
    gap = (w - solution.tensor.decode()).double()
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    return ((gap @ damped) * gap).sum(1)


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.name)
def test_no_row_gets_worse_and_most_get_better(
    grid: AffineGrid, desc_act: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, hessian = problem()
    [found] = solve([w], hessian, grid, desc_act=desc_act)
    monkeypatch.setattr(descend, "SWEEPS", 0)
    [before] = solve([w], hessian, grid, desc_act=desc_act)
    after, start = losses(w, found, hessian), losses(w, before, hessian)
    assert (after <= start * (1 + 1e-5)).all()
    assert after.sum() < 0.99 * start.sum()
    gap = w - found.tensor.decode()
    assert found.error == pytest.approx(
        float(torch.trace(gap @ hessian @ gap.T) / torch.trace(w @ hessian @ w.T)), rel=1e-3
    )


def test_in_the_end_no_other_code_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descend, "SWEEPS", 30)
    w, hessian = problem(k=96)
    grid = IntGrid(3, -1)
    [found] = solve([w], hessian, grid)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(96)
    value = found.tensor.decode().double()
    pull = (w.double() - value) @ damped
    for step in (-1, 1):
        codes = found.tensor.codes.int() + step
        inside = (codes >= 0) & (codes <= grid.max_code)
        moved = step * found.tensor.scales.scale.double()  # by which the value would rise, [N, 1]
        rise = -2 * moved * pull + moved**2 * damped.diagonal()
        assert (rise[inside] > -1e-6 * damped.diagonal().mean()).all()


def test_in_the_end_scales_are_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descend, "SWEEPS", 30)
    w, hessian = problem(k=32)
    [found] = solve([w], hessian, Q4_0())
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(32)
    levels = found.tensor.codes.double() - 8
    best = ((levels @ damped) * w).sum(1) / ((levels @ damped) * levels).sum(1)
    torch.testing.assert_close(found.tensor.scales.scale[:, 0].double(), best, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "grid", [IntGrid(4, 32), IntGrid(4, 128, sym=False), Q4_K(), IQ4_XS()], ids=lambda g: g.name
)
def test_the_compiled_loop_descends_as_torch_does(grid: AffineGrid) -> None:
    w, hessian = problem(k=256)
    codes = torch.randint(0, grid.max_code + 1, (1, 256, 24), generator=torch.Generator().manual_seed(0))
    scales = grid.fit(w)
    stacked = type(scales)(scales.scale[None], scales.offset[None])

    def after(compiled: bool) -> descend.Descent:
        begun = descend.Descent.begin(
            grid,
            w.T[None].contiguous(),
            codes.to(torch.uint8).clone(),
            stacked,
            hessian[None],
            torch.zeros(1),
        )
        columns = begun._columns(slice(0, 256))
        pull = begun.hessian @ begun.error
        tensors = (columns.scale, columns.offset, pull, begun.codes, begun.error)
        if compiled:
            descend._core.descend_columns(grid.compiled, hessian[None].numpy(), *(x.numpy() for x in tensors))
        else:
            descend._one_by_one(grid, hessian[None], columns, pull, begun.codes, begun.error)
        torch.testing.assert_close(pull, begun.hessian @ begun.error, rtol=1e-3, atol=1e-4)
        return begun

    compiled, expected = after(True), after(False)
    assert (compiled.codes != expected.codes).float().mean() < 0.01
    values = w.T[None] - compiled.error
    torch.testing.assert_close(values, compiled._values(slice(0, 256)), rtol=1e-4, atol=1e-5)


def test_columns_that_make_no_whole_group(monkeypatch: pytest.MonkeyPatch) -> None:
    w, hessian = problem(k=80)
    [found] = solve([w], hessian, IntGrid(3, 32))
    monkeypatch.setattr(descend, "SWEEPS", 0)
    [before] = solve([w], hessian, IntGrid(3, 32))
    assert losses(w, found, hessian).sum() < losses(w, before, hessian).sum()


def test_a_hopeless_problem_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, hessians = zip(*(problem(k=64, seed=seed) for seed in range(2)), strict=True)
    indefinite = hessians[1] - 30 * hessians[1].diagonal().mean()
    indefinite.diagonal().copy_(hessians[1].diagonal())
    w, hessian = torch.stack(weights), torch.stack([hessians[0], indefinite])
    found = solve_stack([w], hessian, Q4_0())
    monkeypatch.setattr(descend, "SWEEPS", 0)
    before = solve_stack([w], hessian, Q4_0())
    assert found[1][0].fallback and torch.equal(found[1][0].tensor.codes, before[1][0].tensor.codes)
    assert found[0][0].error < before[0][0].error
