"""Experts in an ONNX graph: all of a layer in one operator where that is exact, else one after the other.

The operators (MoE for floats, QMoE for 4 bits) take the softmax over the chosen experts, which is `norm_topk_prob`;
without it a token's result is multiplied by the share of the full softmax that its chosen experts have.
QMoE rounds activations to 8 bits for other widths than 4, so those go one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qwen_quant.exporters.onnx_blocks import Blocks, block_size, stored_bits, to_blocks
from qwen_quant.exporters.onnx_graph import Graph
from qwen_quant.exporters.onnx_ops import Ops
from qwen_quant.grids.gptq import IntGrid
from qwen_quant.moe import PROJECTIONS, MoESpec, expert_name


def add_experts(graph: Graph, ops: Ops, moe: MoESpec, layer: int, x: str) -> str:
    """What a sparse block adds to the hidden states, without its shared expert, from x [batch, seq, hidden]."""
    router = ops.linear(x, [f"model.layers.{layer}.mlp.gate.weight"])
    logits = graph.add("Reshape", router, graph.constant([-1, moe.num_experts]))  # [tokens, experts]
    one = ops.weights.choices[expert_name(layer, 0, PROJECTIONS[0])]
    alike = len({ops.weights.choices[name].name for name in names_of(moe, layer)}) == 1
    if not (ops.packs_experts and alike):
        return one_by_one(graph, ops, moe, layer, x, logits)
    if one.grid is None:
        mixed = float_experts(graph, ops, moe, layer, x, logits)
    elif stored_bits(one.grid) == 4 and shared_block(ops, one.grid, moe) and not ops.weights.act_order:
        mixed = integer_experts(graph, ops, moe, layer, x, logits)
    else:
        return one_by_one(graph, ops, moe, layer, x, logits)
    if moe.norm_topk_prob:
        return mixed
    shares, _ = best(graph, moe, graph.add("Softmax", logits, axis=-1))
    share = graph.add("ReduceSum", shares, graph.constant([-1]), keepdims=1)  # [tokens, 1]
    shape = graph.add("Concat", graph.add("Shape", x, start=0, end=2), graph.constant([1]), axis=0)
    return graph.add("Mul", mixed, graph.add("Reshape", share, shape))


def names_of(moe: MoESpec, layer: int) -> Iterator[str]:
    """Every expert's weights."""
    return (expert_name(layer, e, p) for e in range(moe.num_experts) for p in PROJECTIONS)


def best(graph: Graph, moe: MoESpec, scores: str) -> tuple[str, str]:
    """The largest scores of each token and whose they are, both [tokens, num_experts_per_tok]."""
    values, experts = graph.value("values"), graph.value("experts")
    count = graph.constant([moe.num_experts_per_tok])
    graph.add("TopK", scores, count, outputs=[values, experts], axis=-1)
    return values, experts


def shared_block(ops: Ops, grid: IntGrid, moe: MoESpec) -> int | None:
    """The block in which both products of an expert can be stored, None if there is none."""
    sizes = ops.spec.hidden_size, moe.moe_intermediate_size
    block = min(block_size(grid, k) for k in sizes)
    return None if any(k % block for k in sizes) else block


def float_experts(graph: Graph, ops: Ops, moe: MoESpec, layer: int, x: str, logits: str) -> str:
    """Experts stored as floats, by the operator MoE."""
    kind = ops.weights.choices[expert_name(layer, 0, PROJECTIONS[0])].type
    count, size, hidden = moe.num_experts, moe.moe_intermediate_size, ops.spec.hidden_size

    def wide() -> Iterator[np.ndarray]:
        for expert in range(count):
            yield interleaved([whole(ops, expert_name(layer, expert, p), kind) for p in PROJECTIONS[:2]])

    prefix = f"model.layers.{layer}.mlp.experts"
    first = graph.weight(f"{prefix}.gate_up_proj.weight", kind, (count, 2 * size, hidden), wide())
    downs = ops.weights.floats([expert_name(layer, e, PROJECTIONS[2]) for e in range(count)], kind)
    second = graph.weight(f"{prefix}.down_proj.weight", kind, (count, hidden, size), downs)
    inputs = (x, logits, ops.widened(first, kind), "", ops.widened(second, kind))
    return graph.contrib("MoE", *inputs, **operator(moe))


def whole(ops: Ops, name: str, kind: str) -> np.ndarray:
    """A matrix as stored."""
    return np.concatenate(list(ops.weights.floats([name], kind)))


def interleaved(pair: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of gate and up in turn [2 N, …], as the operators with `swiglu_fusion` 1 read them."""
    return np.stack(pair, axis=1).reshape(-1, *pair[0].shape[1:])


def operator(moe: MoESpec) -> dict[str, Any]:
    """The attributes that MoE and QMoE share: silu(gate) * up, softmax over the chosen."""
    return {
        "k": moe.num_experts_per_tok,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "normalize_routing_weights": 1,
    }


def integer_experts(graph: Graph, ops: Ops, moe: MoESpec, layer: int, x: str, logits: str) -> str:
    """Experts in blocks of 4 bits, by the operator QMoE."""
    grid = ops.weights.choices[expert_name(layer, 0, PROJECTIONS[0])].grid
    assert grid is not None
    block = shared_block(ops, grid, moe)
    prefix = f"model.layers.{layer}.mlp.experts"

    def one(expert: int, projections: Sequence[str]) -> Blocks:
        found = []
        for projection in projections:
            name = expert_name(layer, expert, projection)
            found.append(to_blocks(ops.weights.where(name), ops.weights.quantized(name), block))
        return found[0] if len(found) == 1 else paired(found)

    count, size, hidden = moe.num_experts, moe.moe_intermediate_size, ops.spec.hidden_size
    wide = (one(expert, PROJECTIONS[:2]) for expert in range(count))
    first = stacked(ops, f"{prefix}.gate_up_proj", (count, 2 * size, hidden), wide)
    tall = (one(expert, PROJECTIONS[2:]) for expert in range(count))
    second = stacked(ops, f"{prefix}.down_proj", (count, hidden, size), tall)
    inputs = [x, logits, first[0], first[1], "", second[0], second[1]]
    if first[2] or second[2]:
        inputs += ["", "", "", "", first[2], second[2]]
    return graph.contrib(
        "QMoE", *inputs, **operator(moe), expert_weight_bits=4, block_size=block, accuracy_level=0
    )


def paired(pair: Sequence[Blocks]) -> Blocks:
    """Gate and up of an expert as one matrix with their rows in turn."""
    gate, up = pair
    zeros = None
    if gate.zeros is not None or up.zeros is not None:
        zeros = interleaved([gate.all_zeros(), up.all_zeros()])
    codes, scales = interleaved([gate.codes, up.codes]), interleaved([gate.scales, up.scales])
    return Blocks(gate.bits, gate.block, codes, scales, zeros)


def stacked(
    ops: Ops, name: str, shape: tuple[int, int, int], experts: Iterator[Blocks]
) -> tuple[str, str, str]:
    """Codes, scales and zeros ("" where all are 8) of matrices [experts, N, K], written as they come."""
    count, n, k = shape
    scales: list[np.ndarray] = []
    zeros: list[np.ndarray] = []
    plain = True

    def codes() -> Iterator[np.ndarray]:
        nonlocal plain
        for blocks in experts:
            plain = plain and blocks.zeros is None
            scales.append(blocks.scales)
            zeros.append(blocks.packed_zeros())
            yield blocks.packed_codes()

    stored = ops.graph.weight(f"{name}.codes", "U8", (count, n, k // 2), codes())
    scale = ops.scales(f"{name}.scales", np.stack(scales))
    if plain:
        return stored, scale, ""
    return stored, scale, ops.graph.weight(f"{name}.zeros", "U8", (count, *zeros[0].shape), zeros)


def one_by_one(graph: Graph, ops: Ops, moe: MoESpec, layer: int, x: str, logits: str) -> str:
    """Each expert for the tokens that chose it, added to their rows; exact for every type of weights."""
    hidden = ops.spec.hidden_size
    scores = graph.add("Softmax", logits, axis=-1)
    values, chosen = best(graph, moe, scores)
    if moe.norm_topk_prob:
        values = graph.add("Div", values, graph.add("ReduceSum", values, graph.constant([-1]), keepdims=1))
    none = graph.add("Mul", scores, graph.constant(0, np.float32))
    shares = graph.add("ScatterElements", none, chosen, values, axis=-1)  # [tokens, experts]
    tokens = graph.add("Reshape", x, graph.constant([-1, hidden]))
    total = graph.add("Mul", tokens, graph.constant(0, np.float32))
    for expert in range(moe.num_experts):
        with graph.scope(f"experts.{expert}"):
            mine = graph.add("Gather", shares, graph.constant(expert), axis=1)  # [tokens]
            rows = graph.add("Transpose", graph.add("NonZero", mine), perm=[1, 0])  # [chosen by, 1]
            mlp = swiglu(
                ops,
                graph.add("GatherND", tokens, rows),
                [expert_name(layer, expert, projection) for projection in PROJECTIONS],
            )
            share = graph.add("Unsqueeze", graph.add("GatherND", mine, rows), graph.constant([1]))
            total = graph.add("ScatterND", total, rows, graph.add("Mul", mlp, share), reduction="add")
    return graph.add("Reshape", total, graph.add("Shape", x))


def add_shared(graph: Graph, ops: Ops, layer: int, x: str) -> str:
    """What the shared expert makes of all tokens, times a gate of its own."""
    prefix = f"model.layers.{layer}.mlp."
    with graph.scope("shared_expert"):
        gate = graph.add("Sigmoid", ops.linear(x, [f"{prefix}shared_expert_gate.weight"]))
        found = swiglu(ops, x, [f"{prefix}shared_expert.{p}.weight" for p in PROJECTIONS])
        return graph.add("Mul", found, gate)


def swiglu(ops: Ops, x: str, names: Sequence[str]) -> str:
    """down(silu(gate(x)) * up(x)) for the weights gate, up and down."""
    gate, up, down = names
    return ops.linear(ops.gated(ops.linear(x, [gate]), ops.linear(x, [up])), [down])
