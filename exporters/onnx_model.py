"""A decoder as an ONNX graph: the same walk for fused and for standard operators.

Inputs and outputs have the names that Optimum, transformers.js and onnxruntime-genai know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from qwen_quant.exporters.onnx_graph import Graph
from qwen_quant.exporters.onnx_moe import add_experts, add_shared, swiglu
from qwen_quant.exporters.onnx_ops import Ops, Step
from qwen_quant.names import HEAD
from qwen_quant.spec import ModelSpec

LAST_ONLY = "num_logits_to_keep"


def cache_form(ops: Ops) -> tuple[str, int]:
    """Type and last dimension of the caches: FP32, int8, or two 4-bit codes to a byte."""
    if ops.cache is None:
        return "F32", ops.spec.head_dim
    return ("I8", ops.spec.head_dim) if ops.cache.bits == 8 else ("U8", ops.spec.head_dim // 2)


def add_inputs(graph: Graph, ops: Ops) -> None:
    """Tokens, mask, positions and caches; 0 logits to keep means all."""
    graph.input("input_ids", "I64", ("batch_size", "sequence_length"))
    graph.input("attention_mask", "I64", ("batch_size", "total_sequence_length"))
    graph.input("position_ids", "I64", ("batch_size", "sequence_length"))
    kind, width = cache_form(ops)
    shape = ("batch_size", ops.spec.num_key_value_heads, "past_sequence_length", width)
    for layer in range(ops.spec.num_hidden_layers):
        graph.input(f"past_key_values.{layer}.key", kind, shape)
        graph.input(f"past_key_values.{layer}.value", kind, shape)
    graph.optional_input(LAST_ONLY, np.array(0, dtype=np.int64))


def add_outputs(graph: Graph, ops: Ops) -> None:
    """Logits and caches."""
    spec, (kind, width) = ops.spec, cache_form(ops)
    graph.output("logits", "F32", ("batch_size", "logits_length", spec.vocab_size))
    shape = ("batch_size", spec.num_key_value_heads, "total_sequence_length", width)
    for layer in range(spec.num_hidden_layers):
        graph.output(f"present.{layer}.key", kind, shape)
        graph.output(f"present.{layer}.value", kind, shape)


def rotary_tables(graph: Graph, spec: ModelSpec, length: int) -> tuple[str, str]:
    """cos and sin [length, head_dim / 2] of the reference model, with its context extension, FP32.

    They follow from constants, so a runtime computes them once, when it loads the graph; in the file they would take
    512 bytes for each position of the context (head_dim 128).
    """
    from qwen_quant.model import new_rotary

    # Up to `length` neither dual chunks nor Qwen (1)'s dynamic base change anything.
    rotary = new_rotary(replace(spec, dual_chunk=None))
    numbers = (graph.constant(number, np.float32) for number in (0, length, 1))
    with graph.scope("rotary"):
        positions = graph.add("Unsqueeze", graph.add("Range", *numbers), graph.constant([1]))
        angles = graph.add("Mul", positions, graph.array("inv_freq", rotary.inv_freq.numpy()))
        tables = graph.add("Cos", angles), graph.add("Sin", angles)
        if rotary.scale == 1.0:
            return tables
        scale = graph.constant(rotary.scale, np.float32)
        return graph.add("Mul", tables[0], scale), graph.add("Mul", tables[1], scale)


def build(graph: Graph, ops: Ops, layers: Iterator[Any | None], context: int) -> None:
    """Add the whole decoder, a layer as each of `layers` arrives (None: from the checkpoint), after them what was
    solved outside, if anything was."""
    spec, names = ops.spec, ops.spec.names
    add_inputs(graph, ops)
    with graph.scope("model"):
        tables = rotary_tables(graph, spec, context)
        step = Step("input_ids", "attention_mask", "position_ids", *tables)
        hidden = ops.embed("input_ids", f"{names.embedding}.weight")
        normed = ops.norm(hidden, f"{names.layer(0)}{names.attention_norm}.weight")
        for index, layer in zip(range(spec.num_hidden_layers), layers, strict=False):
            ops.weights.layer = layer
            with graph.scope(f"layers.{index}"):
                attended = add_attention(graph, ops, step, index, normed)
                mlp_norm = f"{names.layer(index)}{names.mlp_norm}.weight"
                normed, hidden = ops.add_norm(attended, hidden, mlp_norm)
                moved = add_mlp(graph, ops, index, normed)
                last = index + 1 == spec.num_hidden_layers
                following = names.norm if last else f"{names.layer(index + 1)}{names.attention_norm}"
                normed, hidden = ops.add_norm(moved, hidden, f"{following}.weight", last)
            ops.weights.layer = None
            if layer is not None:
                layer.tensors.clear()
        kept = last_tokens(graph, normed)
        head = names.embedding if spec.tie_word_embeddings else HEAD
        logits = ops.head(kept, f"{head}.weight")
    ops.weights.layer = outer = next(layers, None)
    ops.write_outer()
    if outer is not None:
        outer.tensors.clear()
        next(layers, None)  # the quantizer ends its run
    graph.add("Identity", logits, outputs=["logits"])
    add_outputs(graph, ops)


def last_tokens(graph: Graph, hidden: str) -> str:
    """The last `num_logits_to_keep` of hidden states [batch, seq, hidden], all of them for 0."""
    count = graph.add("Reshape", LAST_ONLY, graph.constant([1]))
    start = graph.add("Neg", count)
    end = graph.constant([np.iinfo(np.int64).max])
    return graph.add("Slice", hidden, start, end, graph.constant([1]))


def add_mlp(graph: Graph, ops: Ops, layer: int, x: str) -> str:
    """What the layer adds to the hidden states after its attention, from normed ones [batch, seq, hidden]."""
    spec = ops.spec
    with graph.scope("mlp"):
        if spec.moe is None or not spec.is_sparse(layer):
            prefix = spec.names.layer(layer)
            return swiglu(ops, x, [f"{prefix}{name}.weight" for name in spec.names.mlp])
        experts = add_experts(graph, ops, spec.moe, layer, x)
        if spec.moe.shared_expert_intermediate_size is None:
            return experts
        return graph.add("Add", experts, add_shared(graph, ops, layer, x))


def add_attention(graph: Graph, ops: Ops, step: Step, layer: int, x: str) -> str:
    """What the attention adds to the hidden states, from normed ones [batch, seq, hidden]."""
    spec, names = ops.spec, ops.spec.names
    prefix = names.layer(layer)
    with graph.scope("attention"):
        context = ops.attention(step, layer, project(graph, ops, layer, x))
        bias = bias_of(ops, [f"{prefix}{names.output}"]) if spec.output_bias else None
        return ops.linear(context, [f"{prefix}{names.output}.weight"], bias)


def project(graph: Graph, ops: Ops, layer: int, x: str) -> list[str]:
    """Queries, keys and values, each [batch, seq, heads * head_dim], or all three side by side.

    One product for all three reads, and at accuracy_level 4 rounds, the activations once; per-head norms have it cut.
    """
    spec, names = ops.spec, ops.spec.names
    modules = [f"{names.layer(layer)}{name}" for name in names.qkv]
    weights = [f"{module}.weight" for module in modules]
    if ops.packs_qkv and ops.weights.can_stack(weights):
        found = [ops.linear(x, weights, bias_of(ops, modules) if spec.qkv_bias else None)]
        if not spec.qk_norm:
            return found
    else:
        found = [
            ops.linear(x, [f"{module}.weight"], bias_of(ops, [module]) if spec.qkv_bias else None)
            for module in modules
        ]
    if len(found) == 1:
        found = ops.split(found[0], [spec.q_size, spec.kv_size, spec.kv_size])
    if spec.qk_norm:
        for index, name in enumerate(("q_norm", "k_norm")):
            norm = f"{names.layer(layer)}self_attn.{name}.weight"
            found[index] = head_norm(graph, ops, found[index], norm)
    return found


def bias_of(ops: Ops, modules: list[str]) -> str:
    """The biases of linear layers side by side."""
    name = "+".join(modules) + ".bias"
    values = np.concatenate([ops.weights.vector(f"{module}.bias") for module in modules])
    return ops.graph.array(name, values)


def head_norm(graph: Graph, ops: Ops, x: str, name: str) -> str:
    """RMSNorm of each head of x [batch, seq, heads * head_dim]."""
    heads = graph.add("Reshape", x, graph.constant([0, 0, -1, ops.spec.head_dim]))
    return graph.add("Reshape", ops.norm(heads, name), graph.constant([0, 0, -1]))
