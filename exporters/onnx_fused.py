"""The steps of a decoder as onnxruntime's fused operators (domain com.microsoft).

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from onnx import TensorProto

from qwen_quant.exporters.onnx_blocks import Blocks
from qwen_quant.exporters.onnx_ops import Ops, Step


class FusedOps(Ops):
    """GroupQueryAttention, MatMulNBits and their kin."""

    opset = 21
    packs_qkv = packs_experts = shares_buffer = True

    def norm(self, x: str, name: str) -> str:
        return self.graph.add(
            "SimplifiedLayerNormalization",
            x,
            self.vector(name),
            axis=-1,
            epsilon=self.spec.rms_norm_eps,
            stash_type=TensorProto.FLOAT,
        )

    def add_norm(self, x: str, residual: str, name: str, last: bool = False) -> tuple[str, str]:
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

    def gated(self, gate: str, up: str) -> str:
        return self.graph.add("Mul", self.graph.contrib("QuickGelu", gate, alpha=1.0), up)

    def float_product(self, x: str, weight: str, kind: str) -> str:
        return self.graph.contrib("FusedMatMul", x, self.widened(weight, kind), transB=1)

    def integer_product(self, x: str, stem: str, blocks: Blocks, bias: str | None) -> str:
        graph, packed = self.graph, blocks.packed_codes()
        codes = graph.weight(f"{stem}.codes", "U8", packed.shape, [packed])
        scales = self.scales(f"{stem}.scales", blocks.scales)
        zeros = "" if blocks.zeros is None else graph.array(f"{stem}.zeros", blocks.packed_zeros())
        return self._product(
            [x, codes, scales, zeros, "", bias or ""], blocks.shape, blocks.bits, blocks.block
        )

    def _product(self, inputs: list[str], shape: tuple[int, int], bits: int, block: int) -> str:
        while not inputs[-1]:
            inputs.pop()
        n, k = shape
        return self.graph.contrib(
            "MatMulNBits", *inputs, N=n, K=k, bits=bits, block_size=block, accuracy_level=0
        )

    def integer_rows(self, tokens: str, name: str) -> str:
        grid = self.outer_grid(name)
        return self.graph.contrib(
            "GatherBlockQuantized",
            f"{name}.rows",
            tokens,
            self.outer_scales(name),
            gather_axis=0,
            quantize_axis=1,
            block_size=grid.group_size,
            bits=grid.bits,
        )

    def integer_head(self, x: str, name: str) -> str:
        grid, (n, k) = self.outer_grid(name), self.weights.choices[name].info.shape
        inputs = [x, f"{name}.codes", self.outer_scales(name)]
        return self._product(inputs, (n, k), grid.bits, grid.group_size)

    def store_outer(self, name: str) -> None:
        graph, grid = self.graph, self.outer_grid(name)
        n, k = self.weights.choices[name].info.shape
        scales: list[np.ndarray] = []
        parts = self.weights.outer(name, scales)
        shape = (n, k // grid.group_size, grid.group_size * grid.bits // 8)
        graph.weight(f"{name}.codes", "U8", shape, (part.packed_codes() for part in parts))
        self.store_outer_scales(name, scales)
        graph.alias(f"{name}.rows", f"{name}.codes", (n, k * grid.bits // 8))

    @cached_property
    def _lengths(self) -> tuple[str, str]:
        """int32 [batch], the last position in use of each text's cache, and int32, how many the longest has."""
        graph, mask = self.graph, "attention_mask"
        one = graph.constant([1])
        last = graph.add("Sub", graph.add("ReduceSum", mask, one, keepdims=0), one)
        longest = graph.add("Gather", graph.add("Shape", mask), graph.constant(1), axis=0)
        return graph.add("Cast", last, to=TensorProto.INT32), graph.add("Cast", longest, to=TensorProto.INT32)

    def attention(self, step: Step, layer: int, qkv: Sequence[str]) -> str:
        spec, window = self.spec, self.spec.window(layer)
        query, key, value = qkv if len(qkv) == 3 else (qkv[0], "", "")
        context = self.graph.value("context")
        scales, kinds = self._cache_scales(layer)
        self.graph.contrib(
            "GroupQueryAttention",
            query,
            key,
            value,
            f"past_key_values.{layer}.key",
            f"past_key_values.{layer}.value",
            *self._lengths,
            step.cos,
            step.sin,
            step.positions,
            *scales,
            outputs=[context, f"present.{layer}.key", f"present.{layer}.value"],
            num_heads=spec.num_attention_heads,
            kv_num_heads=spec.num_key_value_heads,
            do_rotary=1,
            rotary_interleaved=0,
            local_window_size=-1 if window is None else window,
            **kinds,
        )
        return context

    def _cache_scales(self, layer: int) -> tuple[list[str], dict[str, Any]]:
        """Inputs and attributes of a quantized cache; none of both without one."""
        if self.cache is None:
            return [], {}
        keys, values = (
            self.graph.array(f"layers.{layer}.{half}_scale", scales[layer].ravel())
            for half, scales in (("key", self.cache.keys), ("value", self.cache.values))
        )
        kinds = {f"{half}_quant_type": "PER_CHANNEL" for half in "kv"}
        return ["", "", keys, values], {**kinds, "kv_cache_bit_width": self.cache.bits}
