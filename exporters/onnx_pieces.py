"""Running a graph piece by piece, so that memory holds the weights of one piece at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from qwen_quant.runtime.onnx import open_graph

PIECE_BYTES = 64 << 20  # weights of a piece, unless a single node has more
Values = dict[str, np.ndarray]


def run_pieces(
    beside: Path, model: onnx.ModelProto, feeds: Sequence[Values], wanted: Sequence[str]
) -> tuple[list[Values], float]:
    """The values `wanted` for each of `feeds` (inputs by name), and the seconds that running took, without loading.

    `beside` is a name for temporary files in the folder of the model's external data.
    """
    held = [dict(values) for values in feeds]
    nodes = list(model.graph.node)
    seconds, stop = 0.0, 0
    for piece in _pieces(model):
        stop += len(piece.graph.node)
        later = {*wanted, *(name for node in nodes[stop:] for name in node.input)}
        made = [name for node in piece.graph.node for name in node.output if name in later]
        taken = _add_inputs(piece, held[0])
        piece.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
        try:
            onnx.save(piece, beside)
            session = open_graph(beside)
        finally:
            beside.unlink(missing_ok=True)
        for values in held:
            began = time.perf_counter()
            found = session.run(made, {name: values[name] for name in taken})
            seconds += time.perf_counter() - began
            values.update(zip(made, found, strict=True))
            for name in values.keys() - later:
                del values[name]
        del session  # before the next one is opened
    return held, seconds


def _pieces(model: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """The nodes in turn with their weights, as models that lack inputs and outputs."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    size = 0
    for node in model.graph.node:
        own = sum(_nbytes(weights[name]) for name in set(node.input) & weights.keys())
        if nodes and size + own > PIECE_BYTES:
            yield _model_of(model, nodes, weights)
            nodes, size = [], 0
        nodes.append(node)
        size += own
    yield _model_of(model, nodes, weights)


def _nbytes(tensor: onnx.TensorProto) -> int:
    """Bytes in the external file, where tensors of any size lie."""
    return sum(int(entry.value) for entry in tensor.external_data if entry.key == "length")


def _model_of(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], weights: dict[str, onnx.TensorProto]
) -> onnx.ModelProto:
    used = [name for name in dict.fromkeys(i for node in nodes for i in node.input) if name in weights]
    graph = helper.make_graph(nodes, "piece", [], [], [weights[name] for name in used])
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _add_inputs(piece: onnx.ModelProto, values: Values) -> list[str]:
    """Make what the piece reads of `values` its inputs; their names."""
    inside = {name for node in piece.graph.node for name in node.output}
    inside |= {tensor.name for tensor in piece.graph.initializer}
    used = dict.fromkeys(name for node in piece.graph.node for name in node.input if name)
    taken = [name for name in used if name not in inside]
    for name in taken:
        kind = helper.np_dtype_to_tensor_dtype(values[name].dtype)
        piece.graph.input.append(helper.make_tensor_value_info(name, kind, [None] * values[name].ndim))
    return taken
