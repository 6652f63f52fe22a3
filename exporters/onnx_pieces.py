"""Running a graph piece by piece, so that memory holds the weights of one piece at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qwen_quant.quantize.heap import give_back_memory
from qwen_quant.runtime.onnx import open_graph

PIECE_BYTES = 64 << 20  # weights of a piece, unless a single node has more
Values = dict[str, np.ndarray]


def run_pieces(
    beside: Path, model: onnx.ModelProto, feeds: Sequence[Values], wanted: Sequence[str]
) -> tuple[list[Values], float]:
    """The values `wanted` for each of `feeds` (inputs by name), and the seconds that running took, without loading.

    `beside` is a name for temporary files in the folder of the model's external data.
    """
    give_back_memory()
    held = [dict(values) for values in feeds]
    weights = Stored(with_rows_apart(model)[0])
    rest = _needed(weights, wanted)
    seconds = 0.0
    for nodes in list(_pieces(weights, rest)):
        rest = rest[len(nodes) :]
        later = {*wanted, *(name for node in rest for name in node.input if name)}
        made = [name for node in nodes for name in node.output if name in later]
        piece = weights.model_of(nodes)
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
            # Arrays of a session lie in its arena, all of which would stay as long as one of them.
            values.update((name, array.copy()) for name, array in zip(made, found, strict=True))
            for name in values.keys() - later:
                del values[name]
        del session
        give_back_memory()  # before the next one is opened
    return held, seconds


class Stored:
    """The weights of a model, with those that a Cast widens when they are loaded, and the nodes that compute."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.widened = {
            node.output[0]: node
            for node in model.graph.node
            if node.op_type == "Cast" and node.input[0] in self.tensors
        }
        self.nodes = [node for node in model.graph.node if node.output[0] not in self.widened]

    def loaded_bytes(self, node: onnx.NodeProto) -> int:
        """What a node's weights take in memory."""
        stored = sum(_nbytes(self.tensors[name]) for name in set(node.input) & self.tensors.keys())
        for name in set(node.input) & self.widened.keys():
            stored += 3 * _nbytes(self.tensors[self.widened[name].input[0]])  # 16 bits, and 32
        if node.op_type != "MatMulNBits":
            return stored
        to_floats = _attribute(node, "bits").i == 8 and _attribute(node, "accuracy_level").i == 0
        return 4 * stored if to_floats else stored

    def model_of(self, nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
        """Some nodes and their weights, as a model that lacks inputs and outputs."""
        read = dict.fromkeys(name for node in nodes for name in node.input)
        casts = [self.widened[name] for name in read if name in self.widened]
        read |= dict.fromkeys(cast.input[0] for cast in casts)
        used = [self.tensors[name] for name in read if name in self.tensors]
        graph = helper.make_graph([*casts, *nodes], "piece", [], [], used)
        model = self._model
        return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _needed(weights: Stored, wanted: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes that something `wanted` depends on."""
    names, kept = set(wanted), []
    for node in reversed(weights.nodes):
        if names & set(node.output):
            names |= set(node.input)
            kept.append(node)
    return kept[::-1]


def _with_nodes(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    found = onnx.ModelProto()
    found.CopyFrom(model)
    del found.graph.node[:]
    found.graph.node.extend(nodes)
    return found


def with_rows_apart(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The model with products of large matrices cut into some of fewer rows, and of all products the names by those
    they have then.

    At accuracy_level 0 onnxruntime widens 8-bit weights to FP32, and a head has as many as several layers.
    """
    weights = Stored(model)
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    names: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and weights.loaded_bytes(node) > PIECE_BYTES:
            parts, cut = _cut_rows(node, weights)
            nodes += parts
            tensors += cut
            names |= {part.name: node.name for part in parts if part.op_type == node.op_type}
        else:
            nodes.append(node)
            names |= {node.name: node.name} if node.op_type == "MatMulNBits" else {}
    found = _with_nodes(model, nodes)
    found.graph.initializer.extend(tensors)
    return found, names


def _cut_rows(node: onnx.NodeProto, weights: Stored) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """A MatMulNBits as products with some rows of its weights each, then what puts their columns together."""
    rows = _attribute(node, "N").i
    step = -(-rows // -(-weights.loaded_bytes(node) // PIECE_BYTES))
    nodes, tensors, together = [], [], []
    for start in range(0, rows, step):
        part, stop = onnx.NodeProto(), min(start + step, rows)
        part.CopyFrom(node)
        part.name, part.output[0] = f"{node.name}.{start}", f"{node.output[0]}.{start}"
        _attribute(part, "N").i = stop - start
        for index, name in enumerate(node.input):
            if index and name:
                part.input[index] = stored = f"{name}.{start}:{stop}"
                if name in weights.widened:
                    cast = onnx.NodeProto()
                    cast.CopyFrom(weights.widened[name])
                    name, stored = cast.input[0], f"{cast.input[0]}.{start}:{stop}"
                    cast.name, cast.input[0], cast.output[0] = stored, stored, part.input[index]
                    nodes.append(cast)
                tensors.append(_rows_of(weights.tensors[name], stored, start, stop, rows))
        nodes.append(part)
        together.append(part.output[0])
    nodes.append(helper.make_node("Concat", together, list(node.output), f"{node.name}.concat", axis=-1))
    return nodes, tensors


def _rows_of(tensor: onnx.TensorProto, name: str, start: int, stop: int, rows: int) -> onnx.TensorProto:
    """Some of the `rows` of a tensor, without reading it where it lies in the external file."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        values = numpy_helper.to_array(tensor).reshape(rows, -1)[start:stop]
        part = numpy_helper.from_array(values, name)
    else:
        places = {entry.key: entry.value for entry in tensor.external_data}
        size = int(places["length"]) // rows
        places |= {"offset": str(int(places["offset"]) + start * size), "length": str((stop - start) * size)}
        part = onnx.TensorProto(name=name, data_type=tensor.data_type)
        part.data_location = onnx.TensorProto.EXTERNAL
        for key, value in places.items():
            part.external_data.add(key=key, value=value)
    del part.dims[:]
    part.dims.extend([tensor.dims[0] * (stop - start) // rows, *tensor.dims[1:]])
    return part


def _pieces(weights: Stored, nodes: Sequence[onnx.NodeProto]) -> Iterator[list[onnx.NodeProto]]:
    """The nodes in turn, as many together as have weights of PIECE_BYTES."""
    piece: list[onnx.NodeProto] = []
    size = 0
    for node in nodes:
        own = weights.loaded_bytes(node)
        if piece and size + own > PIECE_BYTES:
            yield piece
            piece, size = [], 0
        piece.append(node)
        size += own
    yield piece


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(attribute for attribute in node.attribute if attribute.name == name)


def _nbytes(tensor: onnx.TensorProto) -> int:
    """Bytes in the external file, where tensors of any size lie."""
    return sum(int(entry.value) for entry in tensor.external_data if entry.key == "length")


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
