"""The solver against a textbook GPTQ in float64, and its behaviour on hard Hessians."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen_quant.errors import CalibrationError
from qwen_quant.grids import Q4_0, Q4_1, Q8_0, IntGrid
from qwen_quant.grids.base import AffineGrid
from qwen_quant.grids.iq4 import IQ4_NL, IQ4_XS
from qwen_quant.grids.k_quants import Q3_K, Q4_K, Q5_K, Q6_K
from qwen_quant.quantize import compensate, descend, gptq
from qwen_quant.quantize.factor import factorise, output_error
from qwen_quant.quantize.gptq import solve, solve_stack

GRIDS = [
    IntGrid(4, 32),
    IntGrid(4, 64, sym=False),
    IntGrid(3, -1),
    IntGrid(2, 32),
    IntGrid(8, 128),
    Q4_0(),
    Q4_1(),
    Q8_0(),
]


def problem(n: int = 24, k: int = 128, tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [n, k] and the Hessian [k, k] of correlated inputs with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    x = torch.randn(tokens, k, generator=generator) @ mix
    x[:, ::17] *= 6
    w = torch.randn(n, k, generator=generator) / k**0.5
    return w, x.T @ x / tokens


def textbook(w: torch.Tensor, hessian: torch.Tensor, grid: AffineGrid, damp: float) -> np.ndarray:
    """Algorithm 1 of arXiv:2210.17323 with block size 1, in float64, columns by falling diag(H)."""
    diagonal = torch.diagonal(hessian)
    order = torch.argsort(diagonal, descending=True, stable=True)
    h = hessian.double()[order][:, order]
    h += torch.eye(len(h), dtype=torch.float64) * damp * h.diagonal().mean()
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    importance = torch.empty_like(diagonal)
    importance[order] = upper.diagonal().float() ** -2  # what an error of 1 costs: see `error` below
    columns = grid.spread(grid.fit(w, importance), w.shape[1])
    work = w.double()[:, order].clone()
    codes = torch.empty(w.shape, dtype=torch.uint8)
    for i, column in enumerate(order):
        scale, offset = columns.scale[:, column].double(), columns.offset[:, column].double()
        code = grid.round(work[:, i], scale, offset)
        codes[:, column] = code.to(torch.uint8)
        error = (work[:, i] - grid.value(code, scale, offset)) / upper[i, i]
        work[:, i:] -= torch.outer(error, upper[i, i:])
    return codes.numpy()


@pytest.mark.parametrize("grid", [*GRIDS, Q6_K(), Q4_K(), IQ4_NL(), IQ4_XS()], ids=lambda g: g.name)
def test_the_compiled_loop_rounds_as_torch_does(grid: AffineGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    w, hessian = problem(k=256)
    [compiled] = solve([w], hessian, grid)
    monkeypatch.setattr(compensate, "_round_columns", compensate._round_one_by_one)
    [expected] = solve([w], hessian, grid)
    # Sums are rounded in another order: a value between two codes may fall to the other one.
    assert (compiled.tensor.codes != expected.tensor.codes).float().mean() < 0.01
    assert compiled.error == pytest.approx(expected.error, rel=0.01)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.name)
def test_equals_the_textbook(grid: AffineGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descend, "SWEEPS", 0)
    w, hessian = problem()
    [solution] = solve([w], hessian, grid, damp_percent=0.01)
    expected = textbook(w, hessian, grid, 0.01)
    found = solution.tensor.codes.numpy()
    # float32 against float64: a value that lies between two codes may fall to the other one.
    assert (found != expected).mean() < 0.02
    assert solution.error < solution.rtn_error


def test_factor_is_the_cholesky_factor_of_the_damped_hessian() -> None:
    _, hessian = problem()
    factor = factorise(hessian[None], 0.01)
    assert factor.failed == [""] and factor.dampings == [0.01]
    lower = factor.spread[0].double() * factor.pivots[0]
    assert torch.equal(lower, lower.tril()) and torch.all(factor.spread[0].diagonal() == 1)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    torch.testing.assert_close(lower @ lower.T, damped, rtol=1e-4, atol=1e-4)


def test_output_error_is_that_of_the_hessian_without_damping() -> None:
    w, hessian = problem(n=5, k=300)
    found = output_error(w.T[None].contiguous(), factorise(hessian[None], 0.1))[0]
    torch.testing.assert_close(found, torch.diagonal(w @ hessian @ w.T).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.name)
def test_beats_round_to_nearest(grid: AffineGrid) -> None:
    w, hessian = problem(seed=3)
    [solution] = solve([w], hessian, grid)
    assert solution.error < solution.rtn_error
    difference = w - solution.tensor.decode()
    expected = torch.trace(difference @ hessian @ difference.T) / torch.trace(w @ hessian @ w.T)
    assert solution.error == pytest.approx(float(expected), rel=1e-3)
    plain = w - grid.plain_rounding(w).decode()
    expected = torch.trace(plain @ hessian @ plain.T) / torch.trace(w @ hessian @ w.T)
    assert solution.rtn_error == pytest.approx(float(expected), rel=1e-3)


def test_weights_on_several_grids_are_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the Hessian's factor, which is computed once."""
    grids = [Q5_K(), IntGrid(4, 32), Q5_K(), Q3_K()]
    hessian = problem(k=256)[1]
    weights = [problem(n, 256, seed=n)[0] for n in (24, 8, 16, 12)]
    alone = [solve([w], hessian, grid)[0] for w, grid in zip(weights, grids, strict=True)]
    factored = []
    monkeypatch.setattr(gptq, "factorise", lambda *given: factored.append(1) or factorise(*given))
    for one, grid, found in zip(alone, grids, solve(weights, hessian, grids), strict=True):
        assert found.tensor.grid.name == grid.name
        assert torch.equal(found.tensor.codes, one.tensor.codes)
        assert found.error == pytest.approx(one.error, rel=1e-5)
    assert factored == [1]


def test_stacking_changes_nothing() -> None:
    first, hessian = problem(seed=1)
    second = problem(n=40, seed=2)[0]
    together = solve([first, second], hessian, IntGrid(4, 32))
    for weight, solution in zip((first, second), together, strict=True):
        [alone] = solve([weight], hessian, IntGrid(4, 32))
        assert (alone.tensor.codes != solution.tensor.codes).float().mean() < 0.01
        assert alone.error == pytest.approx(solution.error, rel=0.02)


@pytest.mark.parametrize("desc_act", [False, True])
def test_rows_are_solved_in_parts(desc_act: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    first, hessian = problem(n=50, seed=1)
    second = problem(n=20, seed=2)[0]
    whole = solve([first, second], hessian, IntGrid(4, 32), desc_act=desc_act)
    monkeypatch.setattr(gptq, "FLOATS_AT_ONCE", 16 * 128)
    for one, other in zip(
        whole, solve([first, second], hessian, IntGrid(4, 32), desc_act=desc_act), strict=True
    ):
        assert (one.tensor.codes != other.tensor.codes).float().mean() < 0.01
        # Products of other sizes are summed in another order, which may round a scale to the next FP16 value.
        torch.testing.assert_close(one.tensor.scales.scale, other.tensor.scales.scale, rtol=1e-3, atol=0)
        assert one.error == pytest.approx(other.error, rel=0.02)
        assert one.rtn_error == pytest.approx(other.rtn_error, rel=1e-4)


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.name)
def test_a_stack_is_each_problem_alone(grid: AffineGrid, desc_act: bool) -> None:
    """A hopeless Hessian among them falls back alone."""
    problems = [problem(seed=seed) for seed in range(3)]
    hopeless = problems[1][1] - 30 * problems[1][1].diagonal().mean()
    problems[1] = (problems[1][0], hopeless.fill_diagonal_(1.0))
    w, hessian = (torch.stack(parts) for parts in zip(*problems, strict=True))
    stacked = solve_stack([w[:, :10], w[:, 10:]], hessian, grid, desc_act=desc_act)
    for (weight, moments), solved in zip(problems, stacked, strict=True):
        for part, found in zip((weight[:10], weight[10:]), solved, strict=True):
            [alone] = solve([part], moments, grid, desc_act=desc_act)
            assert (alone.tensor.codes != found.tensor.codes).float().mean() < 0.01
            torch.testing.assert_close(alone.tensor.scales.scale, found.tensor.scales.scale)
            assert alone.error == pytest.approx(found.error, rel=0.02)
            assert (alone.fallback, alone.damping) == (found.fallback, found.damping)
            if desc_act:
                assert torch.equal(alone.tensor.group_index, found.tensor.group_index)
    assert [bool(solved[0].fallback) for solved in stacked] == [False, True, False]


def test_desc_act_orders_groups_by_activation() -> None:
    w, hessian = problem()
    grid = IntGrid(4, 32)
    [solution] = solve([w], hessian, grid, desc_act=True)
    index = solution.tensor.group_index
    assert index is not None
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    assert torch.equal(index[order], torch.arange(128) // 32)
    assert solution.error < solution.rtn_error


@pytest.mark.parametrize("rank", [0, 1, 20])
def test_rank_deficient_hessian_still_solves(rank: int) -> None:
    w, _ = problem()
    x = torch.randn(rank, 128)
    [solution] = solve([w], x.T @ x, IntGrid(4, 32))
    assert torch.isfinite(solution.tensor.decode()).all()
    assert solution.error <= solution.rtn_error + 1e-6
    # Few inputs need no more than the usual damping, none at all is another matter.
    assert (solution.damping, solution.more_damping) == (0.01, False) or rank == 0
    assert ("inputs are all zero" in solution.fallback) == (rank == 0)


@pytest.mark.parametrize("damping", [0.1, 1.0, 10.0])
def test_damping_climbs_as_far_as_it_must(damping: float) -> None:
    w, hessian = problem()
    least = torch.linalg.eigvalsh(hessian)[0]
    # Its least eigenvalue becomes what half of `damping` makes up for.
    shift = least + 0.5 * damping * (hessian.diagonal().mean() - least) / (1 + 0.5 * damping)
    indefinite = hessian - shift * torch.eye(len(hessian))
    [solution] = solve([w], indefinite, IntGrid(4, 32))
    assert solution.damping == pytest.approx(damping)
    assert solution.more_damping and not solution.fallback
    difference = (w - solution.tensor.decode()).double()
    expected = ((difference @ indefinite.double()) * difference).sum(1).clamp(min=0)
    torch.testing.assert_close(solution.cost, expected, rtol=1e-2, atol=1e-4)


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    w, hessian = problem()
    hessian[3, 3] = torch.nan
    with pytest.raises(CalibrationError, match="not finite"):
        solve([w], hessian, IntGrid(4, 32))


def test_hopeless_hessian_falls_back_and_says_so() -> None:
    w, hessian = problem()
    indefinite = hessian - 30 * hessian.diagonal().mean() * torch.ones_like(hessian)
    indefinite.diagonal().copy_(hessian.diagonal())
    [solution] = solve([w], indefinite, IntGrid(4, 32))
    assert "not positive definite" in solution.fallback
    expected = IntGrid(4, 32).fit(w, hessian.diagonal() + 0.01 * hessian.diagonal().mean())
    torch.testing.assert_close(solution.tensor.scales.scale, expected.scale)


def test_dead_columns_are_rounded_not_dropped() -> None:
    w, hessian = problem()
    hessian[5], hessian[:, 5] = 0, 0
    [solution] = solve([w], hessian, IntGrid(8, 128))
    # Other implementations set such columns to 0. Here the search may clip an extreme a little, no more.
    torch.testing.assert_close(solution.tensor.decode()[:, 5], w[:, 5], atol=0.03, rtol=0)


def test_errors_of_a_large_weight_are_those_of_one_row_in_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    w, hessian = problem(n=gptq.LARGE + 40)
    [some] = solve([w], hessian, IntGrid(4, 32))
    monkeypatch.setattr(gptq, "LARGE", len(w) + 1)
    [every] = solve([w], hessian, IntGrid(4, 32))
    assert torch.equal(some.tensor.codes, every.tensor.codes)
    measured = torch.arange(len(w)) % gptq.MEASURED == 0
    for part, whole in ((some.cost, every.cost), (some.rtn_cost, every.rtn_cost), (some.size, every.size)):
        torch.testing.assert_close(part[measured], whole[measured], rtol=1e-3, atol=1e-6)
        assert not part[~measured].any()
    assert some.error == pytest.approx(every.error, rel=0.1)
    assert some.rtn_error == pytest.approx(every.rtn_error, rel=0.1)
