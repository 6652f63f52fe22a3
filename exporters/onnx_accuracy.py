"""Which products may round their activations to 8 bits (`accuracy_level` 4): the others cost too much.

Both kinds of a MatMulNBits are run on the same activations of real text, side by side in one graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from qwen_quant.exporters.onnx_pieces import Values, run_pieces, with_rows_apart

LEVELS = {"0": 0, "4": 4}
AUTO = "auto"
# Root mean square of the difference, as a share of the output's, by the bits of the weights. Products with evenly
# spread activations lie near 1 %; channels that stand out far above the others push it up. onnxruntime computes 8-bit
# weights at level 0 dozens of times slower, so those have to be far off.
LIMITS = {4: 0.03, 8: 0.1}
ROWS = "axes of batch and tokens"
_QUANTIZED = ("MatMulNBits", "QMoE")


@dataclass(frozen=True)
class Accuracy:
    """How the products of a graph compute: those at level 0 by name, each with the error that level 4 would have."""

    exact: dict[str, float]
    fast: dict[str, float]
    trials: dict[str, dict[str, float]] = field(default_factory=dict)  # by levels: agreement with 0, seconds

    @property
    def summary(self) -> dict[str, object]:
        """For the artifact's record."""
        errors = {**self.exact, **self.fast}
        return {
            "level_0": len(self.exact),
            "level_4": len(self.fast),
            "largest_error_at_level_4": max(self.fast.values(), default=0.0),
            "median_error": float(np.median(list(errors.values()))) if errors else 0.0,
            "kept_at_level_0": {name: round(error, 4) for name, error in self.exact.items()},
            "trials": self.trials,
        }


def set_level(path: Path, level: int) -> None:
    """Give every product of integers in the graph the same level."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        _set(node, level)
    onnx.save(model, path)


def choose_levels(path: Path, texts: npt.NDArray[np.integer]) -> Accuracy:
    """Measure every MatMulNBits of the graph on token windows [n, T], and give level 4 to those below LIMITS.

    QMoE stays at level 0. The graph runs in pieces: memory holds the weights of one, of both kinds.
    """
    model = onnx.load(path, load_external_data=False)
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    if not products:
        return Accuracy({}, {})
    found = Accuracy({}, {})
    beside, feeds = path.with_name(f".{path.name}.measured"), [_feeds(model, text) for text in texts]
    errors = _measure(beside, model, feeds)
    for node in products:
        bits = next(a.i for a in node.attribute if a.name == "bits")
        fast = errors[node.name] <= LIMITS[bits]
        (found.fast if fast else found.exact)[node.name] = errors[node.name]
        _set(node, 4 if fast else 0)
    onnx.save(model, path)
    chosen = [product_level(node) for node in products]
    found.trials.update(_trials(beside, model, products, {"0": 0, "4": 4, AUTO: chosen}, feeds))
    return found


def product_level(node: onnx.NodeProto) -> int:
    """The accuracy level of a MatMulNBits."""
    return int(next(a.i for a in node.attribute if a.name == "accuracy_level"))


def _trials(
    beside: Path,
    model: onnx.ModelProto,
    products: Sequence[onnx.NodeProto],
    settings: Mapping[str, int | list[int]],
    feeds: Sequence[Values],
) -> dict[str, dict[str, float]]:
    """What each setting buys and costs: the share of tokens whose best continuation is that of the first setting,
    and the seconds to read all texts."""
    model.graph.node.append(helper.make_node("ArgMax", ["logits"], ["best"], axis=-1, keepdims=0))
    best: list[npt.NDArray[np.integer]] = []
    found = {}
    for name, levels in settings.items():
        each = [levels] * len(products) if isinstance(levels, int) else levels
        for node, level in zip(products, each, strict=True):
            _set(node, level)
        values, seconds = run_pieces(beside, model, feeds, ["best"])
        best.append(np.concatenate([of_text["best"][0] for of_text in values]))
        found[name] = {"top1_agreement": float((best[-1] == best[0]).mean()), "seconds": round(seconds, 3)}
    return found


def _set(node: onnx.NodeProto, level: int) -> None:
    if node.op_type in _QUANTIZED:
        attribute = next(a for a in node.attribute if a.name == "accuracy_level")
        attribute.i = level


def _measure(beside: Path, model: onnx.ModelProto, feeds: Sequence[Values]) -> dict[str, float]:
    """The relative error of each product at level 4, over all windows."""
    doubled, names = with_rows_apart(model)
    nodes = list(doubled.graph.node)
    del doubled.graph.node[:]
    for node in nodes:
        if node.name in names:
            _set(node, 0)
        doubled.graph.node.append(node)
        if node.name in names:
            doubled.graph.node.extend(_compared(node))
    doubled.graph.initializer.append(numpy_helper.from_array(np.array([0, 1]), ROWS))
    wanted = [f"{name}.{part}" for name in names for part in ("gap", "size")]
    values, _ = run_pieces(beside, doubled, feeds, wanted)
    columns: dict[str, list[npt.NDArray[np.float64]]] = {}  # of each product, [2, N] in parts
    for part, name in names.items():
        pairs = [[of_text[f"{part}.gap"], of_text[f"{part}.size"]] for of_text in values]
        columns.setdefault(name, []).append(np.sum(pairs, axis=0, dtype=np.float64))
    cuts = _cuts(model)
    return {name: _largest_error(np.hstack(parts), cuts.get(name, [])) for name, parts in columns.items()}


def _largest_error(squares: npt.NDArray[np.float64], cuts: Sequence[int]) -> float:
    """The relative error of a product, given the squares [2, N] of differences and outputs; where several matrices
    are stacked in it, so that it is cut at some columns, that of the worst."""
    sums = (part.sum(axis=1) for part in np.split(squares, cuts, axis=1))
    return max(float(np.sqrt(gap / max(size, np.finfo(np.float32).tiny))) for gap, size in sums)


def _cuts(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Where the columns of products are cut, by their names."""
    inline = {t.name: t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL}
    products = {node.output[0]: node.name for node in model.graph.node if node.op_type == "MatMulNBits"}
    return {
        products[node.input[0]]: np.cumsum(numpy_helper.to_array(inline[node.input[1]]))[:-1].tolist()
        for node in model.graph.node
        if node.op_type == "Split" and node.input[0] in products
    }


def _compared(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The product at level 4, and for each column the squares of its difference from the one at level 0 and of that
    one, summed over the tokens."""
    fast = onnx.NodeProto()
    fast.CopyFrom(node)
    fast.name, fast.output[0] = f"{node.name}.fast", f"{node.name}.fast:0"
    _set(fast, 4)
    gap = f"{node.name}.difference"
    return [
        fast,
        helper.make_node("Sub", [node.output[0], fast.output[0]], [gap]),
        helper.make_node("ReduceSumSquare", [gap, ROWS], [f"{node.name}.gap"], keepdims=0),
        helper.make_node("ReduceSumSquare", [node.output[0], ROWS], [f"{node.name}.size"], keepdims=0),
    ]


def _feeds(model: onnx.ModelProto, text: npt.NDArray[np.integer]) -> Values:
    """Inputs of a prompt [T] on an empty cache."""
    feeds = {
        "input_ids": text.astype(np.int64)[None],
        "attention_mask": np.ones((1, len(text)), dtype=np.int64),
        "position_ids": np.arange(len(text), dtype=np.int64)[None],
    }
    for value in model.graph.input:
        if value.name.startswith("past_key_values."):
            _, heads, _, size = (dim.dim_value for dim in value.type.tensor_type.shape.dim)
            feeds[value.name] = np.zeros((1, heads, 0, size), dtype=np.float32)
    return feeds
