"""Where the exporter takes weights from: a layer just solved, the integers of a GPTQ checkpoint, or its floats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import FormatError
from qwen_quant.exporters.onnx_blocks import Blocks, stack_rows, to_blocks
from qwen_quant.exporters.onnx_choices import Choice
from qwen_quant.grids.base import QuantizedTensor
from qwen_quant.safetensors import encode_floats


class Layer(Protocol):
    """A quantized decoder layer as the quantizer's stream yields it."""

    layer: int
    tensors: dict[str, QuantizedTensor]


class Weights:
    """The tensors of a checkpoint as they are to be stored; `layer` has those that were quantized just now."""

    def __init__(self, checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> None:
        self.checkpoint = checkpoint
        self.choices = choices
        self.layer: Layer | None = None
        self._kept: dict[str, QuantizedTensor] = {}  # read to be compared, not yet written

    def where(self, name: str) -> str:
        """How messages call a tensor."""
        return f"{self.checkpoint.folder}: {name}"

    def vector(self, name: str) -> np.ndarray:
        """A norm's weight or a bias, float32."""
        return self.checkpoint.read(name)

    def quantized(self, name: str) -> QuantizedTensor:
        """A linear layer's integers: those of the solved layer, or the GPTQ checkpoint's own."""
        if self.layer is None:
            return self._kept.pop(name, None) or self.checkpoint.quantized(name)
        tensor = self.layer.tensors.get(name)
        if tensor is None:
            raise FormatError(f"{self.where(name)}: is to be quantized in this file, but was not")
        return tensor

    @property
    def act_order(self) -> bool:
        """Whether the columns of what comes from the checkpoint may not be in the order of their groups."""
        config = self.checkpoint.quantization
        return config is not None and config.desc_act

    def blocks(self, names: Sequence[str]) -> Blocks:
        """Quantized linear layers in blocks, one below the other. Raises FormatError as `to_blocks` does."""
        return to_blocks(self.where(names[0]), stack_rows([self.quantized(name) for name in names]))

    def can_stack(self, names: Sequence[str]) -> bool:
        """Whether linear layers with the same input can be stored as one: same type, same groups."""
        kinds = {(self.choices[name].name, self.choices[name].grid is None) for name in names}
        if len(kinds) > 1:
            return False
        if self.choices[names[0]].grid is None:
            return True
        tensors = {name: self.quantized(name) for name in names}
        if self.layer is None:
            self._kept.update(tensors)
        orders = {None if t.group_index is None else t.group_index.tobytes() for t in tensors.values()}
        return len(orders) == 1

    def floats(self, names: Sequence[str], kind: str) -> Iterator[np.ndarray]:
        """Matrices one below the other as the stored bytes of float type `kind`, in pieces.

        Raises CheckpointError for values that are not finite, FormatError for those that `kind` cannot hold.
        """
        for name in names:
            if self.checkpoint.is_quantized(name):
                parts: Iterable[np.ndarray] = [self.checkpoint.quantized(name).decode()]
            else:
                parts = self.checkpoint.source.chunks(name)
            for part in parts:
                yield encode_floats(self.where(name), part, kind)

    def outer(self, name: str, scales: list[np.ndarray]) -> Iterator[Blocks]:
        """An embedding or head in pieces of rows, whose scales are collected: solved, or else rounded to nearest
        on the scales that err least."""
        for part in self._outer_rows(name):
            blocks = to_blocks(self.where(name), part)
            scales.append(blocks.scales)
            yield blocks

    def _outer_rows(self, name: str) -> Iterator[QuantizedTensor]:
        solved = None if self.layer is None else self.layer.tensors.get(name)
        if solved is not None:
            yield from map(solved.rows, self.checkpoint.source.pieces(name))
            return
        grid = self.choices[name].grid
        assert grid is not None
        for part in self.checkpoint.source.chunks(name):
            yield grid.searched_rounding(part, np.ones(part.shape[1], np.float32))
