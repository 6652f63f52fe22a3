"""ONNX folders: onnxruntime computes from them what the reference model computes."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.onnx_graph import OnnxGraph, graph_of
from helpers.onnx_models import (
    FAMILIES,
    QWEN2,
    QWEN2_MOE,
    QWEN3_MOE,
    SPARSE,
    TOKENS,
    Make,
    check_steps,
    expected,
    operators,
    write_gptq,
)
from onnx import numpy_helper

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import FormatError, UsageError
from qwen_quant.evaluate.selfcheck import self_check
from qwen_quant.exporters.onnx import Form, export_onnx, notes
from qwen_quant.exporters.onnx_blocks import to_blocks
from qwen_quant.exporters.onnx_fused import FusedOps
from qwen_quant.exporters.onnx_graph import Graph, WeightFile
from qwen_quant.exporters.onnx_weights import Weights
from qwen_quant.grids import IntGrid
from qwen_quant.model import load_model
from qwen_quant.quantize.layer import QuantizedLayer
from qwen_quant.quantize.recipe import Recipe
from qwen_quant.quantize.stream import gptq_layers, plain_layers


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_logits_of_every_dense_family(make_model: Make, tmp_path: Path, family: Any) -> None:
    checkpoint = make_model(**family)
    export_onnx(checkpoint, tmp_path / "out", Form("F32"))
    check_steps(tmp_path / "out", expected(checkpoint), 1e-3)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_precision_weights(make_model: Make, tmp_path: Path, kind: str) -> None:
    checkpoint = make_model()
    export_onnx(checkpoint, tmp_path / "out", Form(kind))
    # The checkpoint's BF16 values, all of them normal FP16 numbers or nearly so.
    check_steps(tmp_path / "out", expected(checkpoint), 1e-3)


def test_only_the_last_logits(make_model: Make, tmp_path: Path) -> None:
    checkpoint = make_model()
    export_onnx(checkpoint, tmp_path / "out", Form("F32"))
    last = OnnxGraph(tmp_path / "out")(TOKENS[None], num_logits_to_keep=np.array(1))
    assert last.shape[1] == 1
    assert np.abs(last[0] - expected(checkpoint)[-1:]).max() < 1e-3


def test_batches(make_model: Make, tmp_path: Path) -> None:
    checkpoint = make_model(**QWEN2)
    export_onnx(checkpoint, tmp_path / "out", Form("F32"))
    texts = np.stack([TOKENS, TOKENS[::-1]])
    graph = OnnxGraph(tmp_path / "out", batch=2)
    found = np.concatenate([graph(texts[:, :39]), graph(texts[:, 39:])], axis=1)
    for text, logits in zip(texts, found, strict=True):
        assert np.abs(logits - expected(checkpoint, text.copy())).max() < 1e-3


GRIDS = {
    "int4-g32": {"bits": 4, "group_size": 32},
    "int4-g64-short": {"bits": 4, "group_size": 64},
    "int4-g64-asym": {"bits": 4, "group_size": 64, "sym": False},
    "int4-rows": {"bits": 4, "group_size": -1},
    "int4-g32-act-order": {"bits": 4, "group_size": 32, "desc_act": True},
    "int4-g32-asym-act-order": {"bits": 4, "group_size": 32, "sym": False, "desc_act": True},
    "int8-g64": {"bits": 8, "group_size": 64},
    "int8-g32-asym": {"bits": 8, "group_size": 32, "sym": False},
    "int3-g32": {"bits": 3, "group_size": 32},
    "int2-g32-asym": {"bits": 2, "group_size": 32, "sym": False},
}


@pytest.mark.parametrize(
    ("name", "family"),
    [*((name, "qwen3") for name in GRIDS), ("int4-g64-asym", "qwen2"), ("int4-rows", "qwen2")],
)
def test_the_integers_of_a_gptq_checkpoint(make_model: Make, tmp_path: Path, name: str, family: str) -> None:
    grid = GRIDS[name]
    checkpoint = write_gptq(make_model(**FAMILIES[family]), tmp_path / "gptq", **grid)
    form = Form(token_embedding_type="F32", output_tensor_type="F32")
    written = export_onnx(checkpoint, tmp_path / "out", form)
    assert graph_of(tmp_path / "out").name == ("model_int8.onnx" if grid["bits"] == 8 else "model_q4.onnx")
    assert (
        written.types["model.layers.0.mlp.up_proj.weight"]
        == IntGrid(**{k: v for k, v in grid.items() if k != "desc_act"}).name
    )
    check_steps(tmp_path / "out", expected(checkpoint), 1e-3)
    found = decoded_products(tmp_path / "out")
    stacked = (
        "model.layers.0.self_attn.q_proj+model.layers.0.self_attn.k_proj+model.layers.0.self_attn.v_proj"
    )
    assert stacked in found and len(found) == 2 * 5
    for names, weights in found.items():
        original = np.concatenate([checkpoint.read(f"{module}.weight") for module in names.split("+")])
        assert np.array_equal(weights, original), names


def decoded_products(folder: Path) -> dict[str, np.ndarray]:
    """The weights [N, K] of every MatMulNBits node by the definition of the operator, columns as the input has
    them."""
    model = onnx.load(graph_of(folder))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:  # scales, which are stored in 16 bits
        if node.op_type == "Cast" and node.input[0] in arrays:
            arrays[node.output[0]] = arrays[node.input[0]].astype(np.float32)
    gathers = [node for node in model.graph.node if node.op_type == "Gather" and node.input[1] in arrays]
    orders = {node.output[0]: arrays[node.input[1]] for node in gathers}
    found = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        inputs = [*node.input, "", "", ""]
        attributes = {a.name: a.i for a in node.attribute}
        bits, block, k = attributes["bits"], attributes["block_size"], attributes["K"]
        codes = unpacked(arrays[inputs[1]], bits).reshape(attributes["N"], -1)  # [N, B * block]
        scales = arrays[inputs[2]].reshape(attributes["N"], -1)  # [N, B]
        zeros = np.full_like(scales, 2 ** (bits - 1))
        if inputs[3]:
            zeros = unpacked(arrays[inputs[3]], bits)[:, : scales.shape[1]].astype(np.float32)
        scales, zeros = (np.repeat(x, block, axis=1)[:, :k] for x in (scales, zeros))
        weights = scales * (codes[:, :k].astype(np.float32) - zeros)
        if inputs[0] in orders:
            weights = weights[:, np.argsort(orders[inputs[0]])]
        found[inputs[1].removesuffix(".codes")] = weights
    return found


@pytest.mark.parametrize("family", [{}, QWEN3_MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("opset", [None, 23])
def test_scales_take_two_bytes_and_no_time(
    make_model: Make, tmp_path: Path, opset: int | None, family: Any
) -> None:
    """onnxruntime widens them when it loads the graph; those that are no FP16 numbers stay FP32."""
    checkpoint = write_gptq(make_model(**family), tmp_path / "gptq", bits=4, group_size=32)
    export_onnx(checkpoint, tmp_path / "out", Form(opset=opset))
    stored = onnx.load(graph_of(tmp_path / "out"), load_external_data=False).graph.initializer
    kinds = {tensor.data_type for tensor in stored if tensor.name.endswith(".scales")}
    assert kinds == {onnx.TensorProto.FLOAT16}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(graph_of(tmp_path / "out"), options, providers=["CPUExecutionProvider"])
    loaded = onnx.load(tmp_path / "loaded.onnx", load_external_data=False).graph
    names = {tensor.name for tensor in loaded.initializer}
    products = [node for node in loaded.node if node.op_type in ("MatMulNBits", "QMoE")]
    assert products and all(node.input[2] in names for node in products)
    assert not any(node.op_type == "Cast" and node.input[0] in names for node in loaded.node)


def test_scales_that_are_no_halves(make_model: Make, tmp_path: Path) -> None:
    with WeightFile(tmp_path / "data") as data:
        graph = Graph(data, 21)
        checkpoint = make_model()
        ops = FusedOps(graph, Weights(checkpoint, {}), checkpoint.spec)
        exact, fine, large = (
            ops.scales(name, np.float32([[value]]))
            for name, value in (("exact", 2**-14), ("fine", 1 + 2**-11), ("large", 1e6))
        )
        assert (fine, large) == ("fine", "large") and exact != "exact"


def unpacked(data: np.ndarray, bits: int) -> np.ndarray:
    """Bytes [..., D] as their codes [..., D * 8 / bits], the lowest bits first."""
    parts = [(data >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(*data.shape[:-1], -1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_embedding_and_head(make_model: Make, tmp_path: Path, tied: bool, kind: str) -> None:
    checkpoint = make_model(tie_word_embeddings=tied)
    sizes = {}
    for outer in ("F32", kind):
        form = Form("F32", token_embedding_type=outer, output_tensor_type=outer)
        sizes[outer] = export_onnx(checkpoint, tmp_path / outer, form).bytes
    saved = (1 if tied else 2) * 4112 * 64 * 4
    stored = (1 if tied else 2) * 4112 * (64 + 4 if kind == "int8" else 32 + 8)
    assert abs(sizes["F32"] - sizes[kind] - (saved - stored)) < 1 << 17  # a tied one is stored once
    model = load_model(checkpoint)
    names = ["model.embed_tokens.weight", "lm_head.weight"][: 1 if tied else 2]
    for name in names:
        values, grid = checkpoint.read(name), IntGrid(8, 64) if kind == "int8" else IntGrid(4, 32)
        rounded = grid.searched_rounding(values, np.ones(64, np.float32)).decode()
        model.load_state_dict({name: torch.from_numpy(rounded)}, strict=False)
    with torch.no_grad():
        wanted = model(torch.from_numpy(TOKENS)[None])[0].numpy()
    check_steps(tmp_path / kind, wanted, 1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_calibrated_integers(make_model: Make, tmp_path: Path, tied: bool) -> None:
    checkpoint = make_model(tie_word_embeddings=tied)
    form = Form("int4", group_size=32)
    windows = np.random.default_rng(0).integers(0, 320, (4, 64)).astype(np.int32)
    layers = list(gptq_layers(checkpoint, form.grids(checkpoint), windows, Recipe(num_samples=4, seq_len=64)))
    weights = {name: tensor.decode() for layer in layers for name, tensor in layer.tensors.items()}
    outer = ["model.embed_tokens.weight"] if tied else ["model.embed_tokens.weight", "lm_head.weight"]
    assert list(layers[-1].tensors) == outer
    written = export_onnx(checkpoint, tmp_path / "out", form, layers=layers, record={"bits": 4})
    assert [layer.layer for layer in written.layers] == [0, 1, -1]
    found = decoded_products(tmp_path / "out")
    assert sum(len(names.split("+")) for names in found) == 15 and len(weights) == 14 + len(outer)
    for names, values in found.items():
        original = np.concatenate(
            [weights[f"{name.removesuffix('.weight')}.weight"] for name in names.split("+")]
        )
        assert np.array_equal(values, original), names
    model = load_model(checkpoint)
    model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()}, strict=False)
    with torch.no_grad():
        check_steps(tmp_path / "out", model(torch.from_numpy(TOKENS)[None])[0].numpy(), 1e-3)
    properties = {
        p.key: p.value for p in onnx.load(graph_of(tmp_path / "out"), load_external_data=False).metadata_props
    }
    assert properties["qwen_quant.bits"] == "4"
    with pytest.raises(UsageError, match="quantized first"):
        export_onnx(checkpoint, tmp_path / "other", form)


def test_solved_layers_are_let_go(make_model: Make, tmp_path: Path) -> None:
    """Memory holds one decoder layer: packed projections are compared, then forgotten."""
    checkpoint, form = make_model(**QWEN2), Form("int4", group_size=32)
    alive: list[weakref.ref] = []

    def layers() -> Iterator[QuantizedLayer]:
        for layer in plain_layers(checkpoint, form.grids(checkpoint)):
            gc.collect()
            assert all(ref() is None for ref in alive)
            alive.extend(weakref.ref(tensor.codes) for tensor in layer.tensors.values())
            yield layer
            layer.tensors.clear()

    export_onnx(checkpoint, tmp_path / "out", form, layers=layers())
    assert len(alive) == 14


def test_groups_of_unequal_size_are_refused(make_model: Make, tmp_path: Path) -> None:
    tensor = IntGrid(4, 32).plain_rounding(np.ones((32, 64), dtype=np.float32))
    tensor.group_index = np.array([0] * 40 + [1] * 24)
    with pytest.raises(FormatError, match=r"weight: its groups \(g_idx\) do not have 32 columns"):
        to_blocks("weight", tensor)


@pytest.mark.parametrize("family", SPARSE.values(), ids=list(SPARSE))
def test_logits_of_models_with_experts(make_model: Make, tmp_path: Path, family: Any) -> None:
    checkpoint = make_model(**family)
    export_onnx(checkpoint, tmp_path / "out", Form("BF16"))
    check_steps(tmp_path / "out", expected(checkpoint), 1e-3)
    assert "MoE" in operators(tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "grid", "fused"),
    [
        (QWEN3_MOE, {"bits": 4, "group_size": 32}, True),
        (QWEN2_MOE, {"bits": 4, "group_size": -1, "sym": False}, True),
        (QWEN3_MOE, {"bits": 3, "group_size": 32}, True),
        (QWEN2_MOE, {"bits": 8, "group_size": 32}, False),
        (QWEN3_MOE, {"bits": 4, "group_size": 32, "desc_act": True}, False),
    ],
)
def test_integers_of_experts(make_model: Make, tmp_path: Path, family: Any, grid: Any, fused: bool) -> None:
    checkpoint = write_gptq(make_model(**family), tmp_path / "gptq", **grid)
    form = Form(token_embedding_type="F32", output_tensor_type="F32")
    export_onnx(checkpoint, tmp_path / "out", form)
    assert ("QMoE" in operators(tmp_path / "out")) is fused
    check_steps(tmp_path / "out", expected(checkpoint), 1e-3)


def test_qwen1(make_qwen1: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_qwen1())
    export_onnx(
        checkpoint, tmp_path / "out", Form("F32"), check=lambda path: self_check(path, checkpoint, 16)
    )
    assert (tmp_path / "out" / "tokenizer.json").is_file()  # in place of qwen.tiktoken, which only we read
    check_steps(tmp_path / "out", expected(checkpoint), 1e-3)
    quantized = write_gptq(checkpoint, tmp_path / "gptq", bits=4, group_size=32)
    form = Form(token_embedding_type="F32", output_tensor_type="F32")
    export_onnx(quantized, tmp_path / "int4", form)
    check_steps(tmp_path / "int4", expected(quantized), 1e-3)


def test_dual_chunk_attention_ends_where_it_begins(make_model: Make, tmp_path: Path) -> None:
    config = {"chunk_size": 40, "local_size": 10}
    checkpoint = make_model(**QWEN2, dual_chunk_attention_config=config)
    assert "ends at 41 tokens" in notes(checkpoint)[0]
    export_onnx(checkpoint, tmp_path / "out", Form("F32"))
    check_steps(tmp_path / "out", expected(checkpoint), 1e-3)  # 40 tokens, more than a chunk's 30
    assert json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["context_length"] == 41


def test_integers_are_not_rounded_twice(make_model: Make, tmp_path: Path) -> None:
    checkpoint = write_gptq(make_model(), tmp_path / "gptq", bits=8, group_size=32)
    with pytest.raises(
        FormatError, match="int8-g32, which int4 would round a second time; export with --type int8"
    ):
        export_onnx(checkpoint, tmp_path / "out", Form("int4"))
    export_onnx(checkpoint, tmp_path / "out", Form("F32"))
    check_steps(tmp_path / "out", expected(checkpoint), 1e-3)


def test_what_a_gptq_checkpoint_leaves_alone(make_model: Make, tmp_path: Path) -> None:
    """Some quantizers skip layers; those stay as they are stored."""
    checkpoint = write_gptq(make_model(**FAMILIES["qwen2"]), tmp_path / "gptq", bits=4, group_size=32)
    name = "model.layers.1.self_attn.k_proj.weight"
    whole = checkpoint.read(name)
    stored, read = checkpoint.is_quantized, checkpoint.source.chunks
    checkpoint.is_quantized = lambda other: other != name and stored(other)  # type: ignore[method-assign]
    dtype = checkpoint.source.dtype
    checkpoint.source.dtype = lambda other: "BF16" if other == name else dtype(other)  # type: ignore[method-assign]
    checkpoint.source.chunks = lambda other: iter([whole]) if other == name else read(other)  # type: ignore[method-assign]
    form = Form(token_embedding_type="F32", output_tensor_type="F32")
    written = export_onnx(checkpoint, tmp_path / "out", form)
    assert written.types[name] == "BF16" and "GPTQ checkpoint stores" in written.unquantized[name]
    checkpoint.is_quantized = stored  # type: ignore[method-assign]
    assert (
        np.abs(OnnxGraph(tmp_path / "out")(TOKENS[None])[0] - expected(checkpoint)).max() < 0.2
    )  # BF16 of one matrix
