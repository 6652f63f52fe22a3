"""Quantizing a checkpoint layer by layer: memory holds one decoder layer, its Hessians and the hidden states.

Each layer's later inputs see its earlier parts already quantized, and each layer sees the quantized layers
before it ("true sequential"). Linear layers that read the same activations share one Hessian and one solve.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import CalibrationError, CheckpointError, UsageError
from qwen_quant.grids.base import AffineGrid, QuantizedTensor, Scales
from qwen_quant.model import DecoderLayer, Rotary, load_layer
from qwen_quant.progress import progress
from qwen_quant.quantize.calibration import Calibration, fast_matmul
from qwen_quant.quantize.gptq import Solution, solve
from qwen_quant.quantize.recipe import GridChoice, Recipe
from qwen_quant.spec import TensorInfo

TOKENS_AT_ONCE = 4096  # calibration tokens per forward pass: bounds activations beside the hidden states
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class LinearReport:
    """How one linear layer came out; errors are relative output errors, `fallback` names a failed solve."""

    name: str
    grid: str
    error: float
    rtn_error: float
    damping: float
    tokens: int
    fallback: str = ""


@dataclass
class QuantizedLayer:
    """The quantized weights of one decoder layer by tensor name (NumPy), and their reports."""

    layer: int
    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    reports: list[LinearReport] = field(default_factory=list)
    seconds: float = 0.0


def pick_device(device: str) -> torch.device:
    """The torch device of `--device`. Raises UsageError when it is not there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {device}: not available here ({reason}); use --device cpu") from None
    return torch.device(device)


def plain_layers(checkpoint: Checkpoint, grids: GridChoice) -> Iterator[QuantizedLayer]:
    """Round every chosen tensor of every decoder layer to nearest; no calibration, no model."""
    spec = checkpoint.spec
    with progress("rounding", spec.num_hidden_layers) as advance:
        for index in range(spec.num_hidden_layers):
            began = time.monotonic()
            result = QuantizedLayer(index)
            for info in spec.layer_tensors(index):
                grid = grids(info)
                if grid is not None:
                    result.tensors[info.name] = grid.plain_rounding(checkpoint.read(info.name))
            result.seconds = time.monotonic() - began
            yield result
            advance(1, f"layer {index}")


def gptq_layers(
    checkpoint: Checkpoint, grids: GridChoice, windows: np.ndarray, recipe: Recipe
) -> Iterator[QuantizedLayer]:
    """Solve every chosen linear of every decoder layer with GPTQ, calibrated on windows [samples, seq_len]."""
    spec = checkpoint.spec
    device = pick_device(recipe.device)
    if checkpoint.quantization is not None:
        raise CheckpointError(f"{checkpoint.folder}: is quantized already; start from the BF16 checkpoint")
    hidden = _embed(checkpoint, windows).to(device)  # [samples, seq, hidden]
    table = Rotary(spec).to(device)(0, windows.shape[1])
    with progress("GPTQ", spec.num_hidden_layers) as advance, torch.no_grad():
        for index in range(spec.num_hidden_layers):
            began = time.monotonic()
            with fast_matmul():
                result = _LayerRun(checkpoint, index, grids, recipe, device).run(hidden, table)
            result.seconds = time.monotonic() - began
            yield result
            advance(1, f"layer {index}")


def _embed(checkpoint: Checkpoint, windows: np.ndarray) -> Tensor:
    """Embeddings [samples, seq, hidden] float32 of token windows."""
    if windows.max() >= checkpoint.spec.vocab_size:
        raise CalibrationError(
            f"{checkpoint.folder}: the tokenizer gives id {windows.max()}, beyond vocab_size "
            f"{checkpoint.spec.vocab_size}; tokenizer and weights do not belong together"
        )
    used, where = np.unique(windows, return_inverse=True)
    rows = checkpoint.source.read_rows("model.embed_tokens.weight", used)
    return torch.from_numpy(rows[where.reshape(windows.shape)])


class _LayerRun:
    """The stages of one decoder layer, each: see the inputs, solve, put the quantized weights in place."""

    def __init__(
        self, checkpoint: Checkpoint, index: int, grids: GridChoice, recipe: Recipe, device: torch.device
    ) -> None:
        self.layer: DecoderLayer = load_layer(checkpoint, index, device)
        self.prefix = f"model.layers.{index}."
        self.infos: dict[str, TensorInfo] = {i.name: i for i in checkpoint.spec.layer_tensors(index)}
        self.grids, self.recipe, self.device = grids, recipe, device
        self.result = QuantizedLayer(index)

    def run(self, hidden: Tensor, table: tuple[Tensor, Tensor]) -> QuantizedLayer:
        """Quantize the layer and carry `hidden` [samples, seq, hidden] through it, in place."""
        layer = self.layer
        batch = max(1, TOKENS_AT_ONCE // hidden.shape[1])
        batches = hidden.split(batch)  # views: writing to one writes to `hidden`

        moments = self._moments(STAGES[0])
        for part in batches:
            moments.add(layer.attention_input(part))
        self._quantize(STAGES[0], moments)

        moments = self._moments(STAGES[1])
        contexts = []
        for part in batches:
            contexts.append(layer.attend(layer.attention_input(part), table))
            moments.add(contexts[-1])
        self._quantize(STAGES[1], moments)

        moments = self._moments(STAGES[2])
        for part in batches:
            part += layer.self_attn.o_proj(contexts.pop(0))
            moments.add(layer.mlp_input(part))
        self._quantize(STAGES[2], moments)

        moments = self._moments(STAGES[3])
        for part in batches:
            moments.add(layer.mlp.gated(layer.mlp_input(part)))
        self._quantize(STAGES[3], moments)

        # The gated activations are computed again rather than kept: they are the widest of all.
        for part in batches:
            part += layer.mlp.down_proj(layer.mlp.gated(layer.mlp_input(part)))
        if not torch.isfinite(hidden.sum()):
            raise CalibrationError(f"{self.prefix[:-1]}: outputs are not finite; the checkpoint is broken")
        return self.result

    def _linear(self, name: str) -> nn.Linear:
        module = self.layer.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def _moments(self, stage: tuple[str, ...]) -> Calibration:
        return Calibration(self._linear(stage[0]).in_features, self.prefix + stage[0], self.device)

    def _quantize(self, stage: tuple[str, ...], moments: Calibration) -> None:
        """Solve the stage's linears, one stacked solve for each distinct grid."""
        by_grid: dict[str, tuple[AffineGrid, list[str]]] = {}
        for name in stage:
            grid = self.grids(self.infos[f"{self.prefix}{name}.weight"])
            if grid is not None:
                by_grid.setdefault(grid.name, (grid, []))[1].append(name)
        for grid, names in by_grid.values():
            weights = [self._linear(name).weight.data for name in names]
            solutions = solve(
                weights,
                moments.hessian,
                grid,
                damp_percent=self.recipe.damp_percent,
                desc_act=self.recipe.desc_act,
            )
            for name, solution in zip(names, solutions, strict=True):
                self._keep(name, grid, solution, moments.n_tokens)

    def _keep(self, name: str, grid: AffineGrid, solution: Solution, tokens: int) -> None:
        full = f"{self.prefix}{name}.weight"
        self._linear(name).weight.data = solution.tensor.decode()
        self.result.tensors[full] = _to_numpy(solution.tensor)
        self.result.reports.append(
            LinearReport(
                full,
                grid.name,
                solution.error,
                solution.rtn_error,
                solution.damping,
                tokens,
                solution.fallback,
            )
        )


def _to_numpy(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same tensor with NumPy arrays of its own (stacked solves hand out views)."""

    def own(x: Tensor) -> np.ndarray:
        return x.cpu().numpy().copy()

    index = None if tensor.group_index is None else own(tensor.group_index)
    return QuantizedTensor(
        tensor.grid, own(tensor.codes), Scales(own(tensor.scales.scale), own(tensor.scales.offset)), index
    )
