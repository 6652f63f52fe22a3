"""Rows that make up for each other, against rounding entry by entry and the dense least-squares loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import QWEN3_MOE

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import CalibrationError
from qwen_quant.grids import Q4_0, IntGrid
from qwen_quant.grids.base import AffineGrid
from qwen_quant.grids.k_quants import Q4_K
from qwen_quant.model import load_model
from qwen_quant.quantize import chains, descend
from qwen_quant.quantize.gptq import solve
from qwen_quant.quantize.recipe import Recipe, linear_grid
from qwen_quant.quantize.row_moments import RowMoments, shrunk
from qwen_quant.quantize.stream import embedded, gptq_layers


def moments(size: int, seed: int = 0) -> torch.Tensor:
    """Second moments [size, size] of correlated values of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) / size**0.5 + torch.eye(size)
    x = torch.randn(8 * size, size, generator=generator) @ mix
    x[:, ::7] *= 3
    return x.T @ x / len(x)


def loss(w: torch.Tensor, q: torch.Tensor, rows: torch.Tensor, hessian: torch.Tensor) -> float:
    """vec(D)ᵀ (G ⊗ H) vec(D), the dense quadratic form, in float64."""
    d = (w - q).double()
    whole = torch.kron(rows.double(), hessian.double())
    return float(d.flatten() @ whole @ d.flatten())


def entry_by_entry(
    w: torch.Tensor, rows: torch.Tensor, hessian: torch.Tensor, grid: AffineGrid, scales: torch.Tensor
) -> torch.Tensor:
    """Each entry rounded to what makes the whole loss least, given those after it; those before it are free to
    follow. Least squares with the dense G ⊗ H; rows and columns in the solver's order."""
    n, k = w.shape
    by_row = torch.argsort(torch.diagonal(rows), stable=True)
    w, rows, scales = w[by_row], rows[by_row][:, by_row], scales[by_row]
    order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True).flip(0)
    whole = torch.kron(rows.double(), hessian.double()[order][:, order])
    columns = w.double()[:, order].flatten()
    target, solved = columns.clone(), torch.zeros(n * k, dtype=torch.bool)
    scale = scales.double()[:, order].flatten()
    for index in range(n * k - 1, -1, -1):
        later = torch.arange(index + 1, n * k)
        free = torch.arange(index + 1)
        best = columns.clone()
        if len(later):
            gap = columns[later] - target[later]
            # What the free entries are best moved by: H_ff d_f = -H_fl d_l, with d = W - Q.
            best[free] += torch.linalg.solve(whole[free][:, free], whole[free][:, later] @ gap)
        code = grid.round(best[index], scale[index], torch.tensor(8.0, dtype=torch.float64))
        target[index] = grid.value(code, scale[index], torch.tensor(8.0, dtype=torch.float64))
        solved[index] = True
    found = torch.empty(n, k, dtype=torch.float64)
    found[by_row[:, None], order] = target.view(n, k)
    return found


def test_makes_the_choices_of_dense_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = 6, 32
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    rows, hessian, grid = moments(n), moments(k, 1), IntGrid(4, 32)
    monkeypatch.setattr(descend, "SWEEPS", 0)  # which goes on from these choices
    monkeypatch.setattr(chains, "TOGETHER", 1)
    monkeypatch.setattr(chains, "DAMPING", 1e-9)
    [found] = solve([w], hessian, grid, damp_percent=1e-6, row_moments=[rows])
    scales = found.tensor.scales.scale.expand(n, k)
    expected = entry_by_entry(w, rows, hessian, grid, scales)
    assert (found.tensor.decode().double() - expected).abs().max() < 1e-4 * float(scales.max())


@pytest.mark.parametrize(
    "grid", [IntGrid(4, 32), IntGrid(2, 32, sym=False), Q4_0(), Q4_K()], ids=lambda g: g.name
)
@pytest.mark.parametrize("desc_act", [False, True])
def test_the_loss_falls_and_each_weight_has_its_own_chain(grid: AffineGrid, desc_act: bool) -> None:
    if desc_act and not isinstance(grid, IntGrid):
        pytest.skip("act-order is GPTQ's")
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    rows = [moments(32), moments(32, 1)]
    hessian = moments(256, 2)
    [plain] = solve([w], hessian, grid, desc_act=desc_act)
    first, second = solve([w[:32], w[32:]], hessian, grid, desc_act=desc_act, row_moments=rows)
    [alone] = solve([w[32:]], hessian, grid, desc_act=desc_act, row_moments=rows[1:])
    assert torch.equal(second.tensor.codes, alone.tensor.codes)
    whole = torch.block_diag(*rows)
    decoded = torch.cat([first.tensor.decode(), second.tensor.decode()])
    assert loss_of(w, decoded, whole, hessian) < 0.97 * loss_of(w, plain.tensor.decode(), whole, hessian)
    error = (w - decoded).double()
    cost, size, rtn_cost = (
        torch.cat([getattr(x, n) for x in (first, second)]) for n in ("cost", "size", "rtn_cost")
    )
    torch.testing.assert_close(cost, ((error @ hessian.double()) * error).sum(1), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(size, plain.size)
    torch.testing.assert_close(rtn_cost, plain.rtn_cost)


def loss_of(w: torch.Tensor, q: torch.Tensor, rows: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(G D H Dᵀ)."""
    d = (w - q).double()
    return float(((rows.double() @ d @ hessian.double()) * d).sum())


def test_the_trace_is_the_dense_form() -> None:
    w, rows, hessian = torch.randn(4, 8), moments(4), moments(8, 1)
    assert loss_of(w, 0 * w, rows, hessian) == pytest.approx(loss(w, 0 * w, rows, hessian))


def test_uncorrelated_rows_are_solved_as_without() -> None:
    w, hessian = torch.randn(16, 64), moments(64)
    [plain] = solve([w], hessian, IntGrid(4, 32))
    for diagonal in (torch.ones(16), torch.rand(16) + 0.1, torch.zeros(16)):
        [found] = solve([w], hessian, IntGrid(4, 32), row_moments=[torch.diag(diagonal)])
        assert torch.equal(found.tensor.codes, plain.tensor.codes)


def test_few_tokens_are_trusted_less() -> None:
    whole = moments(8)
    found = shrunk(whole, 24)
    torch.testing.assert_close(found.diagonal(), whole.diagonal())
    assert float(found[0, 1]) == pytest.approx(0.75 * float(whole[0, 1]))


@pytest.mark.parametrize(
    "changes", [{}, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}]
)
def test_moments_are_those_of_autograd(make_checkpoint: Callable[..., Path], changes: dict) -> None:
    """Against the gradient of the whole model at once, with the tokens that were drawn."""
    if changes:
        changes = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "norm_topk_prob": True,
        } | changes
    checkpoint = Checkpoint(make_checkpoint(**changes))
    windows = np.random.default_rng(0).integers(0, 320, (3, 40)).astype(np.int32)
    with torch.no_grad():  # as between the layers of a run that was left unfinished
        found = RowMoments.measured(checkpoint, embedded(checkpoint, windows), seed=5)

    model = load_model(checkpoint).requires_grad_(False)
    name = "model.layers.0.self_attn.o_proj"
    outputs: list[torch.Tensor] = []

    def watch(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        outputs.append(output.requires_grad_())
        return output

    model.get_submodule(name).register_forward_hook(watch)
    logits = model(torch.from_numpy(windows).long()).flatten(0, 1)
    drawn = torch.multinomial(
        torch.softmax(logits.detach(), -1), 1, generator=torch.Generator().manual_seed(5)
    )
    loss = -torch.log_softmax(logits, -1).gather(1, drawn).sum()
    [gradient] = torch.autograd.grad(loss, outputs)
    g = gradient.flatten(0, 1)
    expected = shrunk(g.T @ g / len(g), len(g))
    moment = found.of(f"{name}.weight", "cpu")
    assert moment is not None
    torch.testing.assert_close(moment, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    queries = found.of("model.layers.1.self_attn.q_proj.weight", "cpu")
    assert queries is not None and queries.shape == (128, 128)
    assert found.of("model.layers.1.mlp.gate_proj.weight", "cpu") is None


SHARED = {
    **QWEN3_MOE,
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "head_dim": None,
    "shared_expert_intermediate_size": 96,
}


@pytest.mark.parametrize(
    ("family", "changes", "shapes"),
    [
        ("make_qwen1", {"num_hidden_layers": 1}, {"attn.c_attn": (192, 192), "mlp.c_proj": (64, 64)}),
        (
            "make_checkpoint",
            SHARED,
            {
                "self_attn.k_proj": (32, 32),
                "self_attn.o_proj": (64, 64),
                "mlp.shared_expert.down_proj": (64, 64),
                "mlp.experts.0.down_proj": None,
                "mlp.gate": None,
            },
        ),
    ],
)
def test_every_family_has_its_chains(
    family: str,
    changes: dict,
    shapes: dict[str, tuple[int, ...] | None],
    request: pytest.FixtureRequest,
) -> None:
    checkpoint = Checkpoint(request.getfixturevalue(family)(**changes))
    windows = np.random.default_rng(0).integers(0, 320, (2, 32)).astype(np.int32)
    found = RowMoments.measured(checkpoint, embedded(checkpoint, windows))
    prefix = checkpoint.spec.names.layer(0)
    for name, shape in shapes.items():
        moments = found.of(f"{prefix}{name}.weight")
        assert shape == (None if moments is None else moments.shape), name
    assert list(gptq_layers(checkpoint, linear_grid(IntGrid(4, 32)), windows, Recipe(output_aware=True)))


def test_a_run_with_and_without(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(make_checkpoint())
    windows = np.random.default_rng(0).integers(0, 320, (8, 64)).astype(np.int32)
    grids = linear_grid(Q4_0())
    found = {
        aware: [
            layer.tensors for layer in gptq_layers(checkpoint, grids, windows, Recipe(output_aware=aware))
        ]
        for aware in (True, False)
    }
    down, gate = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    assert not np.array_equal(found[True][0][down].codes, found[False][0][down].codes)
    assert found[True][0].keys() == found[False][0].keys() and gate in found[True][0]


@pytest.mark.parametrize("factor", [1e20, 1e38])
def test_what_is_not_finite_is_named(make_checkpoint: Callable[..., Path], factor: float) -> None:
    checkpoint = Checkpoint(make_checkpoint())
    read = checkpoint.source.read

    def huge(name: str) -> np.ndarray:
        values = read(name)
        return values * factor if "layers.1.input_layernorm" in name else values

    checkpoint.source.read = huge  # type: ignore[method-assign]
    windows = np.random.default_rng(0).integers(0, 320, (4, 32)).astype(np.int32)
    with pytest.raises(CalibrationError, match=r"model\.layers\.\d.* (not finite|too much)"):
        list(gptq_layers(checkpoint, linear_grid(Q4_0()), windows, Recipe(output_aware=True)))


def test_the_same_bits_from_files(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, recipe = Checkpoint(make_checkpoint()), Recipe(output_aware=True)
    windows = np.random.default_rng(0).integers(0, 320, (20, 64)).astype(np.int32)  # two batches
    plain = gptq_layers(checkpoint, linear_grid(Q4_0()), windows, recipe)
    spilled = gptq_layers(checkpoint, linear_grid(Q4_0()), windows, recipe, spill=tmp_path / "files")
    for first, second in zip(plain, spilled, strict=True):
        assert all(np.array_equal(t.codes, second.tensors[n].codes) for n, t in first.tensors.items())
