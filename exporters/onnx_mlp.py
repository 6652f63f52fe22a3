"""What follows the attention of a layer: SwiGLU, or experts."""

from __future__ import annotations

from qwen_quant.exporters.onnx_fused import FusedOps
from qwen_quant.exporters.onnx_graph import Graph


def add_mlp(graph: Graph, ops: FusedOps, layer: int, x: str) -> str:
    """What the layer adds to the hidden states after its attention, from normed ones [batch, seq, hidden]."""
    with graph.scope("mlp"):
        prefix = ops.spec.names.layer(layer)
        return swiglu(ops, x, [f"{prefix}{name}.weight" for name in ops.spec.names.mlp])


def swiglu(ops: FusedOps, x: str, names: list[str]) -> str:
    """down(silu(gate(x)) * up(x)) for the weights gate, up and down."""
    gate, up, down = names
    return ops.linear(ops.gated(ops.linear(x, [gate]), ops.linear(x, [up])), [down])
