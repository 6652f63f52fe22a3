"""The steps of a decoder as additions to an ONNX graph: what fused and standard operators have in common.

Activations are FP32 throughout, as in the reference model; F16 and BF16 are ways of storing weights, which a reader
widens once when it loads them. Shapes: hidden states [batch, seq, hidden], caches [batch, n_kv_heads, seq, head_dim].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from qwen_quant.exporters.onnx_blocks import Blocks
from qwen_quant.exporters.onnx_graph import Graph
from qwen_quant.exporters.onnx_weights import Weights
from qwen_quant.grids.gptq import IntGrid
from qwen_quant.quantize.kv_ranges import ChannelScales
from qwen_quant.spec import ModelSpec


@dataclass(frozen=True)
class Step:
    """What every attention of a step needs besides its own activations, as values of the graph."""

    tokens: str  # int64 [batch, seq]
    mask: str  # int64 [batch, total]
    positions: str  # int64 [batch, seq]
    cos: str  # FP32 [context, head_dim / 2]
    sin: str


class Ops(ABC):
    """Adds the steps of a decoder to a graph; weights come from `weights` under their checkpoint's names."""

    opset: int
    packs_qkv: bool  # whether attention takes queries, keys and values side by side
    packs_experts: bool  # whether there are operators for all experts of a layer
    shares_buffer: bool  # whether past and present keys and values can be the same memory

    def __init__(
        self, graph: Graph, weights: Weights, spec: ModelSpec, cache: ChannelScales | None = None
    ) -> None:
        self.graph, self.weights, self.spec, self.cache = graph, weights, spec, cache
        self._orders: dict[tuple[str, bytes], str] = {}
        self._outer: list[str] = []  # embedding and head, as far as they are integers
        self._outer_scales: dict[str, str] = {}

    @abstractmethod
    def norm(self, x: str, name: str) -> str:
        """RMSNorm over the last dimension with weight `name`."""

    @abstractmethod
    def add_norm(self, x: str, residual: str, name: str, last: bool = False) -> tuple[str, str]:
        """norm(x + residual), and the sum unless nothing follows that needs it (`last`)."""

    @abstractmethod
    def gated(self, gate: str, up: str) -> str:
        """silu(gate) * up."""

    @abstractmethod
    def float_product(self, x: str, weight: str, kind: str) -> str:
        """x W^T for W [N, K] stored as float type `kind`."""

    @abstractmethod
    def integer_product(self, x: str, stem: str, blocks: Blocks, bias: str | None) -> str:
        """x W^T + bias for a W in blocks, stored under names that begin with `stem`."""

    @abstractmethod
    def integer_rows(self, tokens: str, name: str) -> str:
        """Rows of an embedding that is stored as integers."""

    @abstractmethod
    def integer_head(self, x: str, name: str) -> str:
        """Logits by a head that is stored as integers."""

    @abstractmethod
    def store_outer(self, name: str) -> None:
        """Write the integers of an embedding or head."""

    @abstractmethod
    def attention(self, step: Step, layer: int, qkv: Sequence[str]) -> str:
        """Context vectors [batch, seq, q_size] from queries, keys and values before rotation, or all in one."""

    def vector(self, name: str) -> str:
        """A norm's weight."""
        return self.graph.array(name, self.weights.vector(name))

    def linear(self, x: str, names: Sequence[str], bias: str | None = None) -> str:
        """x W^T + bias, for matrices W that lie one below the other: [batch, seq, rows of all]."""
        choices = [self.weights.choices[name] for name in names]
        stem = "+".join(name.removesuffix(".weight") for name in names)
        if choices[0].grid is not None:
            return self._integers(x, stem, self.weights.blocks(names), bias)
        kind = choices[0].type
        shape = (sum(choice.info.shape[0] for choice in choices), choices[0].info.shape[1])
        weight = self.graph.weight(f"{stem}.weight", kind, shape, self.weights.floats(names, kind))
        return self.add_bias(self.float_product(x, weight, kind), bias)

    def _integers(self, x: str, stem: str, blocks: Blocks, bias: str | None) -> str:
        if blocks.order is not None:
            x = self._permuted(x, blocks.order)
        return self.integer_product(x, stem, blocks, bias)

    def _permuted(self, x: str, order: np.ndarray) -> str:
        """x [..., K] with its columns in `order`; linear layers that share input and order share the result."""
        key = (x, order.tobytes())
        if key not in self._orders:
            index = self.graph.array(f"{x}.order", order)
            self._orders[key] = self.graph.add("Gather", x, index, axis=-1)
        return self._orders[key]

    def widened(self, value: str, kind: str) -> str:
        """A value of float type `kind` as FP32."""
        return value if kind == "F32" else self.graph.add("Cast", value, to=TensorProto.FLOAT)

    def scales(self, name: str, values: np.ndarray) -> str:
        """Scales of blocks, float32, as FP32: stored in F16 where that is exact, as it is of GPTQ's."""
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.array_equal(halves, values):
            return self.graph.weight(name, "F32", values.shape, [values])
        return self.widened(self.graph.weight(name, "F16", values.shape, [halves]), "F16")

    def outer_scales(self, name: str) -> str:
        """The FP32 scales of an embedding or head that is written later."""
        if name not in self._outer_scales:
            self._outer_scales[name] = self.widened(f"{name}.scales", "F16")
        return self._outer_scales[name]

    def store_outer_scales(self, name: str, parts: Sequence[np.ndarray]) -> None:
        """Write them, which the quantizer has rounded to F16."""
        shape = (sum(map(len, parts)), parts[0].shape[1])
        self.graph.weight(f"{name}.scales", "F16", shape, (part.astype(np.float16) for part in parts))

    def add_bias(self, x: str, bias: str | None) -> str:
        """x + bias, where there is one."""
        return x if bias is None else self.graph.add("Add", x, bias)

    def split(self, x: str, sizes: Sequence[int]) -> list[str]:
        """x cut along its last dimension."""
        parts = [self.graph.value("part") for _ in sizes]
        self.graph.add("Split", x, self.graph.constant(list(sizes)), outputs=parts, axis=-1)
        return parts

    def embed(self, tokens: str, name: str) -> str:
        """Rows of the embedding, FP32 [batch, seq, hidden]."""
        choice = self.weights.choices[name]
        if choice.grid is not None:
            self._outer.append(name)
            return self.integer_rows(tokens, name)
        return self.widened(self.graph.add("Gather", self._table(name), tokens), choice.type)

    def head(self, x: str, name: str) -> str:
        """Logits [batch, seq, vocab]; `name` is the embedding's where the two are one tensor."""
        choice = self.weights.choices[name]
        if choice.grid is not None:
            self._outer.append(name)
            return self.integer_head(x, name)
        return self.float_product(x, self._table(name), choice.type)

    def outer_grid(self, name: str) -> IntGrid:
        """The grid of an embedding or head that is stored as integers."""
        grid = self.weights.choices[name].grid
        assert grid is not None
        return grid

    def write_outer(self) -> None:
        """Write the integers of embedding and head, each once: the quantizer delivers them after all layers."""
        for name in dict.fromkeys(self._outer):
            self.store_outer(name)

    def _table(self, name: str) -> str:
        """A float embedding or head, written once."""
        if self.graph.has(name):
            return name
        choice = self.weights.choices[name]
        floats = self.weights.floats([name], choice.type)
        return self.graph.weight(name, choice.type, choice.info.shape, floats)
