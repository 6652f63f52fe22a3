"""An ONNX graph as it is put together: nodes in the order of the computation, weights in one external file.

Weights are appended to the file when their node is added, so memory holds one of them; the graph itself is small and
is written last. IR and external data: https://github.com/onnx/onnx/blob/main/docs/IR.md, ExternalData.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qwen_quant import __version__

CONTRIB = "com.microsoft"
TYPES: dict[str, int] = {
    "F32": TensorProto.FLOAT,
    "F16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "I64": TensorProto.INT64,
    "I32": TensorProto.INT32,
    "I8": TensorProto.INT8,
    "U8": TensorProto.UINT8,
    "I4": TensorProto.INT4,
    "U4": TensorProto.UINT4,
    "BOOL": TensorProto.BOOL,
}
# Readers map the file: a tensor begins on a cache line, a large one on a page of any system (64 KB on Windows).
ALIGNMENT, PAGE, LARGE = 64, 1 << 16, 1 << 20
INLINE_BYTES = (
    1024  # constants up to this size stay in the graph: readers look at them when shapes are inferred
)


class WeightFile:
    """The external data of a model, written from front to back."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._file = path.open("wb")

    def append(self, name: str, kind: str, shape: Sequence[int], parts: Iterable[np.ndarray]) -> TensorProto:
        """Write the bytes of a tensor that comes in `parts`; returns where they lie."""
        tensor = TensorProto(name=name, data_type=TYPES[kind], dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        size = tensor_bytes(kind, shape)
        start = self._align(PAGE if size >= LARGE else ALIGNMENT)
        for part in parts:
            self._file.write(np.ascontiguousarray(part).data)
        written = self._file.tell() - start
        assert written == size, f"{name}: {written} bytes where {kind} {list(shape)} has {size}"
        for key, value in (("location", self.name), ("offset", start), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def _align(self, to: int) -> int:
        start = self._file.tell()
        self._file.write(b"\0" * (-start % to))
        return self._file.tell()

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def tensor_bytes(kind: str, shape: Sequence[int]) -> int:
    """Stored bytes of a tensor; two 4-bit elements share a byte."""
    bits = {"F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I4": 4, "U4": 4}.get(kind, 8)
    count = int(np.prod(shape, dtype=np.int64))
    return -(-count * bits // 8)


class Graph:
    """Nodes and weights so far. Values are strings, the names of ONNX; "" is an input that is left out."""

    def __init__(self, weights: WeightFile, opset: int) -> None:
        self.opset = opset
        self._weights = weights
        self._scope = ""
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._counts: dict[str, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes added within carry `name` in front of theirs, as `/layers.0/mlp`."""
        outer, self._scope = self._scope, f"{self._scope}/{name}"
        try:
            yield
        finally:
            self._scope = outer

    def input(self, name: str, kind: str, shape: Sequence[int | str]) -> str:
        """A graph input; dimensions are numbers or names."""
        self._inputs.append(helper.make_tensor_value_info(name, TYPES[kind], shape))
        return name

    def optional_input(self, name: str, default: np.ndarray) -> str:
        """An input that callers may leave out: an initializer of the same name holds its default."""
        tensor = numpy_helper.from_array(default, name)
        self._inputs.append(helper.make_tensor_value_info(name, tensor.data_type, default.shape))
        self._tensors[name] = tensor
        return name

    def output(self, name: str, kind: str, shape: Sequence[int | str]) -> None:
        """Declare a graph output; some node must have it among its `outputs`."""
        self._outputs.append(helper.make_tensor_value_info(name, TYPES[kind], shape))

    def add(
        self,
        op: str,
        *inputs: str,
        outputs: Sequence[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Append a node; returns its first output, which gets a name of its own unless `outputs` gives one."""
        name = self._unique(op)
        outputs = [f"{name}:0"] if outputs is None else list(outputs)
        self._nodes.append(helper.make_node(op, inputs, outputs, name, domain=domain, **attributes))
        return outputs[0]

    def contrib(self, op: str, *inputs: str, outputs: Sequence[str] | None = None, **attributes: Any) -> str:
        """`add` for an operator of onnxruntime's own."""
        return self.add(op, *inputs, outputs=outputs, domain=CONTRIB, **attributes)

    def value(self, name: str) -> str:
        """A name in this scope that no other value has."""
        return self._unique(name) + ":0"

    def _unique(self, name: str) -> str:
        full = f"{self._scope}/{name}"
        count = self._counts[full] = self._counts.get(full, -1) + 1
        return f"{full}_{count}" if count else full

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        """A small array in the graph itself; equal ones are stored once."""
        array = np.asarray(values, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = name
            self._tensors[name] = numpy_helper.from_array(array, name)
        return self._constants[key]

    def weight(self, name: str, kind: str, shape: Sequence[int], parts: Iterable[np.ndarray]) -> str:
        """A tensor in the external file, whose bytes come in `parts`."""
        self._tensors[name] = self._weights.append(name, kind, shape, parts)
        return name

    def array(self, name: str, array: np.ndarray) -> str:
        """`weight` for an array at hand, whose type is its own; small ones stay in the graph."""
        if array.nbytes <= INLINE_BYTES:
            self._tensors[name] = numpy_helper.from_array(array, name)
            return name
        kind = next(k for k, t in TYPES.items() if t == helper.np_dtype_to_tensor_dtype(array.dtype))
        return self.weight(name, kind, array.shape, [array])

    def alias(self, name: str, other: str, shape: Sequence[int]) -> str:
        """The bytes of `other` once more in another shape, without storing them again."""
        tensor = TensorProto()
        tensor.CopyFrom(self._tensors[other])
        tensor.name = name
        del tensor.dims[:]
        tensor.dims.extend(shape)
        self._tensors[name] = tensor
        return name

    def has(self, name: str) -> bool:
        """Whether a weight of this name was written."""
        return name in self._tensors

    def model(self, name: str) -> onnx.ModelProto:
        """The finished model, whose weights lie in the external file."""
        graph = helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, list(self._tensors.values())
        )
        imports = [helper.make_opsetid("", self.opset)]
        if any(node.domain == CONTRIB for node in self._nodes):
            imports.append(helper.make_opsetid(CONTRIB, 1))
        return helper.make_model(
            graph,
            opset_imports=imports,
            ir_version=helper.find_min_ir_version_for(imports, ignore_unknown=True),
            producer_name="qwen-quant",
            producer_version=__version__,
        )


def add_metadata(path: Path, values: Mapping[str, Any]) -> None:
    """Write keys and values into a stored graph; what is no string becomes JSON."""
    model = onnx.load(path, load_external_data=False)
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, default=str)
        for key, value in values.items()
    }
    helper.set_model_props(model, texts)
    onnx.save_model(model, path)
