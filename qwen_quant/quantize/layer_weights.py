"""The weights of a decoder layer while it is quantized: from the checkpoint, and as they are put in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.grids.base import AffineGrid, QuantizedTensor
from qwen_quant.model import DecoderLayer, load_expert, load_layer
from qwen_quant.quantize.gptq import Solution
from qwen_quant.quantize.layer import LinearReport, QuantizedLayer, Stopwatch, to_numpy, to_torch
from qwen_quant.quantize.recipe import GridChoice, Recipe
from qwen_quant.quantize.row_moments import RowMoments
from qwen_quant.spec import TensorInfo

Solved = tuple[QuantizedTensor, LinearReport]


def recipe_record(recipe: Recipe, grids: Mapping[str, AffineGrid]) -> dict[str, Any]:
    """What decides a result beside weights and data: the recipe, and the grid of each tensor."""
    return recipe.record() | {name: grid.name for name, grid in grids.items()}


class LayerWeights:
    """A decoder layer, its experts on demand, and what has been quantized of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        index: int,
        grids: GridChoice,
        recipe: Recipe,
        device: torch.device,
        keep_activations: bool = True,
        row_moments: RowMoments | None = None,
    ) -> None:
        self.watch = Stopwatch()
        self.checkpoint, self.index = checkpoint, index
        self.layer: DecoderLayer = load_layer(checkpoint, index, device, experts=False)
        self.watch.lap("read")
        self.prefix = checkpoint.spec.names.layer(index)
        self.spec = checkpoint.spec
        self.infos: dict[str, TensorInfo] = {i.name: i for i in checkpoint.spec.layer_tensors(index)}
        self.grids, self.recipe, self.device = grids, recipe, device
        self.keep_activations, self.row_moments = keep_activations, row_moments
        self.result = QuantizedLayer(index)

    def chosen_grids(self) -> dict[str, AffineGrid]:
        """The grid of each tensor of the layer that is quantized."""
        found = {name: self.grids(info) for name, info in self.infos.items()}
        return {name: grid for name, grid in found.items() if grid is not None}

    def recipe_record(self) -> dict[str, Any]:
        """What decides the result beside weights and data."""
        return recipe_record(self.recipe, self.chosen_grids())

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """The layer's full-precision weights one by one; experts are not in memory yet and come from the files. And the
        moments of the gradients, which the weights of all layers after it decide."""
        for name, value in sorted(self.layer.state_dict().items()):
            yield name, self.checkpoint.read(self.prefix + name) if value.is_meta else value.cpu().numpy()
        for name in sorted(self.infos):
            if self.row_moments is not None and (moments := self.row_moments.of(name)) is not None:
                yield f"moments of {name}", moments.numpy()

    def _read(self, experts: range) -> None:
        self.watch.lap("calibrate")
        for expert in experts:
            load_expert(self.layer, self.checkpoint, self.index, expert, self.device)
        self.watch.lap("read")

    def _linear(self, name: str) -> nn.Linear:
        module = self.layer.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def _grids_of(self, names: tuple[str, ...]) -> dict[str, AffineGrid]:
        """The linears of `names` that are quantized, and their grids."""
        found = {name: self.grids(self.infos[f"{self.prefix}{name}.weight"]) for name in names}
        return {name: grid for name, grid in found.items() if grid is not None}

    def _row_moments(self, names: Iterable[str]) -> list[Tensor | None]:
        """What is known of the gradients by the linears' outputs; nothing unless that is asked for."""
        known = self.row_moments
        return [None if known is None else known.of(f"{self.prefix}{n}.weight", self.device) for n in names]

    def _solved(self, name: str, solution: Solution, tokens: int, pooled: float = 0.0) -> Solved:
        """A solution in place of the weight it was made from."""
        self._linear(name).weight.data = solution.tensor.decode()
        report = LinearReport.of(f"{self.prefix}{name}.weight", solution, tokens, pooled)
        return to_numpy(solution.tensor), report

    def _put(self, name: str, tensor: QuantizedTensor) -> None:
        """Replace weight `name` by what was quantized before or elsewhere."""
        module = self._linear(name.removeprefix(self.prefix).removesuffix(".weight"))
        module.weight.data = to_torch(tensor, self.device).decode()

    def _let_go(self, *names: str) -> None:
        """Forget weights that nothing reads any more."""
        for name in names:
            self._linear(name).to("meta")

    def _take(self, found: list[Any], elsewhere: bool) -> None:
        """Keep what was solved, on this rank or `elsewhere`."""
        for tensor, report in found:
            if elsewhere:
                self._put(report.name, tensor)
            self.result.tensors[report.name] = tensor
            self.result.reports.append(report)
