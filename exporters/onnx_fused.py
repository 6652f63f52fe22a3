"""The steps of a decoder as onnxruntime's fused operators (domain com.microsoft).

Activations are FP32 throughout, as in the reference model; F16 and BF16 are ways of storing weights, which a reader
widens once when it loads them. Shapes: hidden states [batch, seq, hidden], caches [batch, n_kv_heads, seq, head_dim].
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from qwen_quant.exporters.onnx_blocks import Blocks
from qwen_quant.exporters.onnx_graph import Graph
from qwen_quant.exporters.onnx_weights import Weights
from qwen_quant.spec import ModelSpec

OPSET = 21


@dataclass(frozen=True)
class Step:
    """What every attention of a step needs besides its own activations, as values of the graph."""

    lengths: str  # int32 [batch]: the cache's last position in use
    total: str  # int32 scalar: positions in the longest cache
    positions: str  # int64 [batch, seq]
    cos: str  # FP32 [context, head_dim / 2]
    sin: str


class FusedOps:
    """Adds the steps of a decoder to a graph; weights come from `weights` under their checkpoint's names."""

    packs_qkv = True  # GroupQueryAttention takes queries, keys and values side by side
    packs_experts = True  # MoE and QMoE

    def __init__(self, graph: Graph, weights: Weights, spec: ModelSpec) -> None:
        self.graph, self.weights, self.spec = graph, weights, spec
        self._orders: dict[tuple[str, bytes], str] = {}

    # Norms

    def norm(self, x: str, name: str) -> str:
        """RMSNorm over the last dimension."""
        return self.graph.add(
            "SimplifiedLayerNormalization",
            x,
            self.vector(name),
            axis=-1,
            epsilon=self.spec.rms_norm_eps,
            stash_type=TensorProto.FLOAT,
        )

    def add_norm(self, x: str, residual: str, name: str, last: bool = False) -> tuple[str, str]:
        """norm(x + residual), and the sum unless nothing follows that needs it."""
        normed = self.graph.value("normed")
        total = "" if last else self.graph.value("sum")
        self.graph.contrib(
            "SkipSimplifiedLayerNormalization",
            x,
            residual,
            self.vector(name),
            outputs=[normed] if last else [normed, "", "", total],
            epsilon=self.spec.rms_norm_eps,
        )
        return normed, total

    def vector(self, name: str) -> str:
        """A norm's weight."""
        return self.graph.array(name, self.weights.vector(name))

    # Linear layers

    def linear(self, x: str, names: Sequence[str], bias: str | None = None) -> str:
        """x W^T + bias, for matrices W that lie one below the other: [batch, seq, rows of all]."""
        choice = self.weights.choices[names[0]]
        stem = "+".join(name.removesuffix(".weight") for name in names)
        if choice.grid is not None:
            return self._integers(x, stem, self.weights.blocks(names), bias)
        shape = (sum(self.weights.choices[n].info.shape[0] for n in names), choice.info.shape[1])
        weight = self.graph.weight(
            f"{stem}.weight", choice.type, shape, self.weights.floats(names, choice.type)
        )
        return self.add_bias(self.float_product(x, weight, choice.type), bias)

    def float_product(self, x: str, weight: str, kind: str) -> str:
        """x W^T for W [N, K] stored as float type `kind`."""
        return self.graph.contrib("FusedMatMul", x, self.widened(weight, kind), transB=1)

    def widened(self, value: str, kind: str) -> str:
        """A value of float type `kind` as FP32."""
        return value if kind == "F32" else self.graph.add("Cast", value, to=TensorProto.FLOAT)

    def add_bias(self, x: str, bias: str | None) -> str:
        """x + bias, where there is one."""
        return x if bias is None else self.graph.add("Add", x, bias)

    def split(self, x: str, sizes: Sequence[int]) -> list[str]:
        """x cut along its last dimension."""
        parts = [self.graph.value("part") for _ in sizes]
        self.graph.add("Split", x, self.graph.constant(list(sizes)), outputs=parts, axis=-1)
        return parts

    def _integers(self, x: str, stem: str, blocks: Blocks, bias: str | None) -> str:
        graph, (n, n_blocks) = self.graph, blocks.scales.shape
        packed = blocks.packed_codes()
        codes = graph.weight(f"{stem}.codes", "U8", packed.shape, [packed])
        scales = graph.weight(f"{stem}.scales", "F32", (n, n_blocks), [blocks.scales])
        zeros = "" if blocks.zeros is None else graph.array(f"{stem}.zeros", blocks.packed_zeros())
        if blocks.order is not None:
            x = self.permuted(x, blocks.order)
        return self.product(x, codes, scales, zeros, blocks.shape, (blocks.bits, blocks.block), bias)

    def permuted(self, x: str, order: np.ndarray) -> str:
        """x [..., K] with its columns in `order`; linear layers that share input and order share the result."""
        key = (x, order.tobytes())
        if key not in self._orders:
            index = self.graph.array(f"{x}.order", order)
            self._orders[key] = self.graph.add("Gather", x, index, axis=-1)
        return self._orders[key]

    def product(
        self,
        x: str,
        codes: str,
        scales: str,
        zeros: str,
        shape: tuple[int, int],
        form: tuple[int, int],
        bias: str | None,
    ) -> str:
        """x W^T + bias for W [N, K] = `shape` in blocks of `form` (bits, block)."""
        inputs = [x, codes, scales, zeros, "", bias or ""]
        while not inputs[-1]:
            inputs.pop()
        (n, k), (bits, block) = shape, form
        return self.graph.contrib(
            "MatMulNBits", *inputs, N=n, K=k, bits=bits, block_size=block, accuracy_level=0
        )

    # MLP

    def gated(self, gate: str, up: str) -> str:
        """silu(gate) * up."""
        return self.graph.add("Mul", self.graph.contrib("QuickGelu", gate, alpha=1.0), up)

    # Embedding and head

    def embed(self, tokens: str, name: str) -> str:
        """Rows of the embedding, FP32 [batch, seq, hidden]."""
        choice, graph = self.weights.choices[name], self.graph
        if choice.grid is None:
            table = graph.weight(name, choice.type, choice.info.shape, self.weights.floats([name], choice.type))
            return self.widened(graph.add("Gather", table, tokens), choice.type)
        codes, scales, form = self._outer_blocks(name)
        n, k = choice.info.shape
        rows = graph.alias(f"{name}.rows", codes, (n, k * form[0] // 8))
        return graph.contrib(
            "GatherBlockQuantized",
            rows,
            tokens,
            scales,
            gather_axis=0,
            quantize_axis=1,
            block_size=form[1],
            bits=form[0],
        )

    def head(self, x: str, name: str) -> str:
        """Logits [batch, seq, vocab]; `name` is the embedding's where the two are one tensor."""
        choice, graph = self.weights.choices[name], self.graph
        if choice.grid is None:
            if not graph.has(name):
                graph.weight(name, choice.type, choice.info.shape, self.weights.floats([name], choice.type))
            return self.float_product(x, name, choice.type)
        codes, scales, form = self._outer_blocks(name)
        n, k = choice.info.shape
        return self.product(x, codes, scales, "", (n, k), form, None)

    def _outer_blocks(self, name: str) -> tuple[str, str, tuple[int, int]]:
        """Codes and scales of an embedding or head, written once, and its bits and block."""
        choice, graph = self.weights.choices[name], self.graph
        assert choice.grid is not None
        n, k = choice.info.shape
        bits, block = choice.grid.bits, choice.grid.group_size
        codes, scales = f"{name}.codes", f"{name}.scales"
        if not graph.has(codes):
            found: list[np.ndarray] = []
            parts = self.weights.rounded(name)
            shape = (n, k // block, block * bits // 8)
            graph.weight(codes, "U8", shape, (found.append(p.scales) or p.packed_codes() for p in parts))
            graph.weight(scales, "F32", (n, k // block), found)
        return codes, scales, (bits, block)

    # Attention

    def step(self, tokens: str, mask: str, positions: str, cos: str, sin: str) -> Step:
        """The values that all layers share."""
        graph = self.graph
        one, first = graph.constant([1]), graph.constant(1)
        read = graph.add("ReduceSum", mask, one, keepdims=0)  # [batch]
        lengths = graph.add("Cast", graph.add("Sub", read, one), to=TensorProto.INT32)
        total = graph.add("Gather", graph.add("Shape", mask), first, axis=0)
        return Step(lengths, graph.add("Cast", total, to=TensorProto.INT32), positions, cos, sin)

    def attention(self, step: Step, layer: int, qkv: Sequence[str]) -> str:
        """Context vectors [batch, seq, q_size] from queries, keys and values before rotation, or all in one."""
        spec = self.spec
        window = spec.window(layer)
        query, key, value = qkv if len(qkv) == 3 else (qkv[0], "", "")
        context = self.graph.value("context")
        self.graph.contrib(
            "GroupQueryAttention",
            query,
            key,
            value,
            f"past_key_values.{layer}.key",
            f"past_key_values.{layer}.value",
            step.lengths,
            step.total,
            step.cos,
            step.sin,
            step.positions,
            outputs=[context, f"present.{layer}.key", f"present.{layer}.value"],
            num_heads=spec.num_attention_heads,
            kv_num_heads=spec.num_key_value_heads,
            do_rotary=1,
            rotary_interleaved=0,
            local_window_size=-1 if window is None else window,
        )
        return context
