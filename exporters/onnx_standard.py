"""The steps of a decoder in standard operators only, for every runtime that has opset 23.

Linear layers are W^T [K, N] behind DequantizeLinear, which onnxruntime turns into MatMulNBits when it loads them.
https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from qwen_quant.errors import UsageError
from qwen_quant.exporters.onnx_blocks import Blocks
from qwen_quant.exporters.onnx_graph import Graph
from qwen_quant.exporters.onnx_ops import Ops, Step
from qwen_quant.exporters.onnx_weights import Weights
from qwen_quant.grids.blocks import pack_planes
from qwen_quant.quantize.kv_ranges import ChannelScales
from qwen_quant.spec import ModelSpec


class StandardOps(Ops):
    """RMSNormalization, RotaryEmbedding, Attention, DequantizeLinear."""

    opset = 23
    packs_qkv = packs_experts = shares_buffer = False

    def __init__(
        self, graph: Graph, weights: Weights, spec: ModelSpec, cache: ChannelScales | None = None
    ) -> None:
        super().__init__(graph, weights, spec)
        if cache is not None:
            raise UsageError(
                f"--kv-cache: the standard Attention of --opset {self.opset} has FP32 caches only; drop one of both"
            )
        self._masks: dict[int | None, str] = {}
        for choice in weights.choices.values():
            if (
                choice.info.role in ("embedding", "head")
                and choice.grid is not None
                and choice.grid.bits != 8
            ):
                raise UsageError(
                    f"--opset {self.opset}: {choice.info.name} cannot be {choice.type}, for the standard Gather "
                    "knows no 4-bit integers; use int8 or a float type"
                )

    def norm(self, x: str, name: str) -> str:
        epsilon = self.spec.rms_norm_eps
        return self.graph.add("RMSNormalization", x, self.vector(name), axis=-1, epsilon=epsilon)

    def add_norm(self, x: str, residual: str, name: str, last: bool = False) -> tuple[str, str]:
        total = self.graph.add("Add", x, residual)
        return self.norm(total, name), total

    def gated(self, gate: str, up: str) -> str:
        return self.graph.add("Mul", self.graph.add("Mul", gate, self.graph.add("Sigmoid", gate)), up)

    def float_product(self, x: str, weight: str, kind: str) -> str:
        turned = self.graph.add("Transpose", self.widened(weight, kind), perm=[1, 0])
        return self.graph.add("MatMul", x, turned)

    def integer_product(self, x: str, stem: str, blocks: Blocks, bias: str | None) -> str:
        graph, signed = self.graph, blocks.zeros is None
        kind = f"{'I' if signed else 'U'}{blocks.bits}"
        n, k = blocks.shape
        stored = elements(blocks.codes.T, blocks, signed)
        inputs = [
            graph.weight(f"{stem}.codes", kind, (k, n), [stored]),
            self.scales(f"{stem}.scales", blocks.scales.T),
        ]
        if blocks.zeros is not None:
            zeros = elements(blocks.zeros.T, blocks, signed)
            inputs.append(graph.weight(f"{stem}.zeros", kind, blocks.zeros.T.shape, [zeros]))
        weight = graph.add("DequantizeLinear", *inputs, axis=0, block_size=blocks.block)
        return self.add_bias(graph.add("MatMul", x, weight), bias)

    def integer_rows(self, tokens: str, name: str) -> str:
        graph, block = self.graph, self.outer_grid(name).group_size
        rows, factors = (
            graph.add("Gather", values, tokens) for values in (f"{name}.codes", self.outer_scales(name))
        )
        return graph.add("DequantizeLinear", rows, factors, axis=2, block_size=block)

    def integer_head(self, x: str, name: str) -> str:
        graph, block = self.graph, self.outer_grid(name).group_size
        stored = f"{name}.codes", self.outer_scales(name)
        weight = graph.add("DequantizeLinear", *stored, axis=1, block_size=block)
        return graph.add("MatMul", x, graph.add("Transpose", weight, perm=[1, 0]))

    def store_outer(self, name: str) -> None:
        graph, (n, k) = self.graph, self.weights.choices[name].info.shape
        scales: list[np.ndarray] = []
        parts = self.weights.outer(name, scales)
        graph.weight(f"{name}.codes", "I8", (n, k), (elements(part.codes, part, True) for part in parts))
        self.store_outer_scales(name, scales)

    def attention(self, step: Step, layer: int, qkv: Sequence[str]) -> str:
        graph, spec = self.graph, self.spec
        query, key, value = qkv
        heads, kv_heads = spec.num_attention_heads, spec.num_key_value_heads
        tables = (step.cos, step.sin, step.positions)
        context = graph.value("context")
        graph.add(
            "Attention",
            graph.add("RotaryEmbedding", query, *tables, num_heads=heads),
            graph.add("RotaryEmbedding", key, *tables, num_heads=kv_heads),
            value,
            self._mask(step, spec.window(layer)),
            f"past_key_values.{layer}.key",
            f"past_key_values.{layer}.value",
            outputs=[context, f"present.{layer}.key", f"present.{layer}.value"],
            q_num_heads=heads,
            kv_num_heads=kv_heads,
        )
        return context

    def _mask(self, step: Step, window: int | None) -> str:
        """Which positions each token sees [batch, 1, seq, total]: those up to its own, within the window, and no
        padding. A token always sees itself, so that padding gives numbers that can be multiplied by zero."""
        if window in self._masks:
            return self._masks[window]
        graph = self.graph
        zero, one = graph.constant(0), graph.constant(1)
        total = graph.add("Gather", graph.add("Shape", step.mask), one)
        past = graph.add("Sub", total, graph.add("Gather", graph.add("Shape", step.tokens), one))
        columns = graph.add("Range", zero, total, one)  # [total]
        rows = graph.add("Unsqueeze", graph.add("Range", past, total, one), graph.constant([1]))  # [seq, 1]
        real = graph.add("Cast", step.mask, to=TensorProto.BOOL)
        real = graph.add("Unsqueeze", real, graph.constant([1, 2]))  # [batch, 1, 1, total]
        seen = graph.add("And", real, graph.add("Less", columns, rows))
        if window is not None:
            first = graph.add("Sub", rows, graph.constant(window))
            seen = graph.add("And", seen, graph.add("Greater", columns, first))
        self._masks[window] = graph.add("Or", seen, graph.add("Equal", columns, rows))
        return self._masks[window]


def elements(values: np.ndarray, blocks: Blocks, signed: bool) -> np.ndarray:
    """Codes or zeros uint8 as bytes of the element type, row by row; the first of two 4-bit ones in the low bits."""
    moved = np.ascontiguousarray(values) ^ np.uint8(blocks.middle if signed else 0)
    flat = moved.reshape(-1)
    if blocks.bits == 8:
        return flat
    return pack_planes(np.pad(flat, (0, flat.size % 2)), 4, 1)
