"""GGUF files: every value decodes to what the checkpoint holds, and nothing half-true is written."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import CheckpointError, FormatError, OutputError, UsageError
from qwen_quant.exporters.gguf import TypeOptions, export_gguf, notes, plan_file
from qwen_quant.exporters.gguf_tensors import gguf_name, pack_tensor
from qwen_quant.grids.base import QuantizedTensor
from qwen_quant.grids.gguf import gguf_grid
from qwen_quant.grids.gptq import IntGrid, pack
from qwen_quant.model import load_model
from qwen_quant.runtime.session import Session
from qwen_quant.safetensors import Planned, SafetensorsFile, SafetensorsWriter, f32_to_bf16
from qwen_quant.tokenizer import Tokenizer

VOCAB = 4112  # more rows than the bundled tokenizer has tokens
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "head_dim": None,
    "tie_word_embeddings": False,
}
MakeModel = Callable[..., Path]


@pytest.fixture
def make_model(make_checkpoint: Callable[..., Path], reference: Path) -> MakeModel:
    """A random tiny checkpoint with the bundled tokenizer."""

    def make(**changes: Any) -> Path:
        folder = make_checkpoint(**{"vocab_size": VOCAB, **changes})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(reference / name, folder / name)
        return folder

    return make


def decoded(reader: gguf.GGUFReader, name: str) -> np.ndarray:
    """A tensor as float32 in its own shape, decoded by the gguf library."""
    tensor = next(t for t in reader.tensors if t.name == name)
    kind = gguf.GGMLQuantizationType(tensor.tensor_type)
    shape = tuple(int(n) for n in tensor.shape[::-1])
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return np.asarray(tensor.data, dtype=np.float32).reshape(shape)
    return dequantize(tensor.data, kind).astype(np.float32).reshape(shape)


def type_of(reader: gguf.GGUFReader, name: str) -> str:
    return next(t for t in reader.tensors if t.name == name).tensor_type.name


def rewrite(folder: Path, changed: dict[str, np.ndarray | None]) -> None:
    """Replace (or with None drop) tensors of a single-file checkpoint."""
    path = folder / "model.safetensors"
    file = SafetensorsFile(path)
    arrays = {name: file.read_raw(name).copy() for name in file.entries}
    kinds = {np.dtype("<u2"): "BF16", np.dtype("<i4"): "I32", np.dtype("<f2"): "F16", np.dtype("<f4"): "F32"}
    arrays.update({name: array for name, array in changed.items() if array is not None})
    for name in [name for name, array in changed.items() if array is None]:
        del arrays[name]
    target = folder / "new"
    with SafetensorsWriter(
        target, [Planned(n, kinds[a.dtype], a.shape) for n, a in arrays.items()]
    ) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    target.replace(path)


def make_gptq(
    folder: Path, grid: IntGrid, act_order: bool = False, keep: str = ""
) -> dict[str, QuantizedTensor]:
    """Turn a float checkpoint into a GPTQ one by plain rounding; `keep` is a linear left as it is."""
    checkpoint = Checkpoint(folder)
    tensors: dict[str, QuantizedTensor] = {}
    changed: dict[str, np.ndarray | None] = {}
    for info in checkpoint.spec.tensors():
        if info.role != "linear" or info.name == keep:
            continue
        tensor = grid.plain_rounding(checkpoint.read(info.name))
        if act_order:
            order = np.random.default_rng(0).permutation(info.shape[1])
            tensor.group_index = (np.arange(info.shape[1]) // grid.columns_per_group(info.shape[1]))[order]
        tensors[info.name] = tensor
        changed[info.name] = None
        for part, array in vars(pack(tensor)).items():
            changed[info.name.removesuffix("weight") + part] = array
    rewrite(folder, changed)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": grid.sym,
        "desc_act": act_order,
        "checkpoint_format": "gptq",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("family", [{}, QWEN2, {"head_dim": 64, "tie_word_embeddings": False}])
@pytest.mark.parametrize("file_type", ["F32", "F16", "BF16"])
def test_float_types_keep_every_value(
    make_model: MakeModel, tmp_path: Path, file_type: str, family: dict[str, Any]
) -> None:
    checkpoint = Checkpoint(make_model(**family))
    written = export_gguf(checkpoint, tmp_path / "m.gguf", file_type)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    infos = checkpoint.spec.tensors()
    assert {t.name for t in reader.tensors} == {gguf_name(i) for i in infos}
    assert written.bytes == (tmp_path / "m.gguf").stat().st_size
    for info in infos:
        expected = checkpoint.read(info.name)
        vector = info.role in ("norm", "bias")
        assert (
            type_of(reader, gguf_name(info)) == ("F32" if vector else file_type) == written.types[info.name]
        )
        if file_type == "F16" and not vector:
            expected = expected.astype(np.float16).astype(np.float32)
        assert np.array_equal(decoded(reader, gguf_name(info)), expected), info.name


@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantized_types_decode_to_our_values(make_model: MakeModel, tmp_path: Path, file_type: str) -> None:
    checkpoint = Checkpoint(make_model(intermediate_size=112, tie_word_embeddings=False))
    written = export_gguf(checkpoint, tmp_path / "m.gguf", file_type)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    down = "model.layers.1.mlp.down_proj.weight"
    for info in checkpoint.spec.tensors():
        weights = checkpoint.read(info.name)
        kind = type_of(reader, gguf_name(info))
        if info.role == "head":
            assert kind == "Q8_0"  # 64 columns are no super-block of Q6_K
        elif info.role in ("embedding", "linear"):
            assert kind == ("F16" if "down_proj" in info.name else file_type)
        if kind.startswith("Q"):
            expected = gguf_grid(kind).plain_rounding(weights).decode()
            assert np.array_equal(decoded(reader, gguf_name(info)), expected), info.name
    assert "112 columns" in written.unquantized[down]
    assert plan_file(checkpoint, file_type).grids(checkpoint.infos[down]) is None


def test_layers_are_written_as_they_come(make_model: MakeModel, tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model())
    grids, rng = plan_file(checkpoint, "Q4_0").grids, np.random.default_rng(0)
    expected: dict[str, np.ndarray] = {}

    def layers() -> Any:
        for index in range(checkpoint.spec.num_hidden_layers):
            tensors = {}
            for info in checkpoint.spec.layer_tensors(index):
                if grid := grids(info):
                    tensors[info.name] = grid.plain_rounding(
                        rng.standard_normal(info.shape, dtype=np.float32)
                    )
                    expected[gguf_name(info)] = tensors[info.name].decode()
            yield SimpleNamespace(layer=index, tensors=tensors)

    written = export_gguf(checkpoint, tmp_path / "m.gguf", "Q4_0", layers=layers())
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert len(expected) == 14
    for name, values in expected.items():
        assert np.array_equal(decoded(reader, name), values)
    assert [layer.layer for layer in written.layers] == [0, 1]
    assert not any(layer.tensors for layer in written.layers)
    with pytest.raises(FormatError, match="was not quantized"):
        export_gguf(checkpoint, tmp_path / "n.gguf", "Q4_0", layers=[SimpleNamespace(layer=0, tensors={})])
    with pytest.raises(FormatError, match="0 layers came of 2"):
        export_gguf(checkpoint, tmp_path / "n.gguf", "Q4_0", layers=[])
    assert [p.name for p in tmp_path.glob("*.gguf")] == ["m.gguf"]


@pytest.mark.parametrize(
    ("bits", "group", "sym", "file_type"),
    [(4, 32, True, "Q4_0"), (4, 64, True, "Q4_0"), (4, 128, True, "Q4_0"), (4, -1, True, "Q4_0"),
     (8, 32, True, "Q8_0"), (8, 128, True, "Q8_0"), (4, 32, False, "Q4_1"), (4, 128, False, "Q4_1")],
)  # fmt: skip
def test_gptq_integers_are_repacked(
    make_model: MakeModel, tmp_path: Path, bits: int, group: int, sym: bool, file_type: str
) -> None:
    folder = make_model(hidden_size=128, intermediate_size=160, num_attention_heads=4)  # a short last group
    kept = "model.layers.1.mlp.up_proj.weight"
    tensors = make_gptq(folder, IntGrid(bits, group, sym), keep=kept)
    checkpoint = Checkpoint(folder)
    export_gguf(checkpoint, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    for name, tensor in tensors.items():
        target = gguf_name(checkpoint.infos[name])
        assert type_of(reader, target) == file_type
        values = decoded(reader, target)
        if sym:
            assert np.array_equal(values, checkpoint.read(name))
        else:
            # Only the minimum is rounded to FP16: half a unit in its last place.
            limit = np.abs(tensor.scales.scale * tensor.scales.offset).max() * 2.0**-11
            assert np.abs(values - checkpoint.read(name)).max() <= limit
        rows = next(t for t in reader.tensors if t.name == target).data
        assert np.array_equal(gguf_grid(file_type).unpack(rows).codes, tensor.codes)
    for name in (kept, "model.embed_tokens.weight"):
        target = gguf_name(checkpoint.infos[name])
        assert type_of(reader, target) == "BF16"
        assert np.array_equal(decoded(reader, target), checkpoint.read(name))


def test_gptq_checkpoint_as_floats(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model()
    make_gptq(folder, IntGrid(3, 32, False))
    checkpoint = Checkpoint(folder)
    export_gguf(checkpoint, tmp_path / "m.gguf", "F32")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(decoded(reader, "blk.0.ffn_up.weight"), checkpoint.read(name))
    with pytest.raises(FormatError, match=r"asymmetric 3-bit.*--type F16"):
        export_gguf(checkpoint, tmp_path / "n.gguf")


@pytest.mark.parametrize(
    ("grid", "act_order", "file_type", "message"),
    [
        (IntGrid(2, 32), False, None, "symmetric 2-bit"),
        (IntGrid(8, 32, False), False, None, "asymmetric 8-bit"),
        (IntGrid(4, 32), False, "Q8_0", "--type Q4_0"),
        (IntGrid(4, 32), True, None, "q_proj.*desc_act.*without --desc-act"),
    ],
)
def test_integers_that_gguf_cannot_hold(
    make_model: MakeModel, tmp_path: Path, grid: IntGrid, act_order: bool, file_type: str | None, message: str
) -> None:
    folder = make_model()
    make_gptq(folder, grid, act_order)
    with pytest.raises(FormatError, match=message):
        export_gguf(Checkpoint(folder), tmp_path / "m.gguf", file_type)
    assert not [p for p in tmp_path.iterdir() if p != folder]


def test_repacking_refuses_what_would_change() -> None:
    rng = np.random.default_rng(0)

    def rounded(k: int, grid: IntGrid) -> QuantizedTensor:
        return grid.plain_rounding(rng.standard_normal((4, k), dtype=np.float32))

    with pytest.raises(FormatError, match="do not fill blocks"):
        pack_tensor("w", rounded(48, IntGrid(4, -1)), gguf_grid("Q4_0"))
    tensor = rounded(64, IntGrid(4, 32))
    tensor.scales.scale = tensor.scales.scale * np.float32(1.0001)
    with pytest.raises(FormatError, match="not FP16"):
        pack_tensor("w", tensor, gguf_grid("Q4_0"))
    tensor = rounded(64, IntGrid(4, 32))
    tensor.scales.offset = tensor.scales.offset + 1
    with pytest.raises(FormatError, match="zeros are not all 8"):
        pack_tensor("w", tensor, gguf_grid("Q4_0"))
    tensor = gguf_grid("Q4_0").plain_rounding(rng.standard_normal((4, 64), dtype=np.float32))
    tensor.scales.scale[0, 0] = np.nan
    with pytest.raises(FormatError, match="not finite"):
        pack_tensor("w", tensor, gguf_grid("Q4_0"))


def test_metadata(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model(head_dim=48, rope_theta=5e5, rms_norm_eps=1e-5)
    checkpoint, tokenizer = Checkpoint(folder), Tokenizer.from_folder(folder)
    record = {
        "calibrate": True,
        "seed": 2**33,
        "damp_percent": 0.01,
        "dataset": "builtin",
        "extra": {"a": [1]},
    }
    export_gguf(checkpoint, tmp_path / "m.gguf", "Q4_0", record=record)
    metadata = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    expected = {
        "general.architecture": "qwen3", "general.type": "model", "general.name": "model",
        "general.file_type": 2, "general.quantization_version": 2,
        "qwen3.block_count": 2, "qwen3.context_length": 512, "qwen3.embedding_length": 64,
        "qwen3.feed_forward_length": 96, "qwen3.attention.head_count": 4, "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 48, "qwen3.attention.value_length": 48,
        "qwen3.rope.dimension_count": 48,
        "qwen3.rope.freq_base": 5e5, "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "qwen3.vocab_size": VOCAB,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": tokenizer.token_id("<|im_end|>"),
        "tokenizer.ggml.eot_token_id": tokenizer.token_id("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": tokenizer.token_id("<|endoftext|>"),
        "tokenizer.chat_template": tokenizer.chat_template,
        "qwen_quant.calibrate": True, "qwen_quant.seed": 2**33, "qwen_quant.damp_percent": 0.01,
        "qwen_quant.dataset": "builtin", "qwen_quant.extra": '{"a": [1]}',
        "qwen_quant.eos_token_ids": list(tokenizer.eos_ids),
    }  # fmt: skip
    assert {key: metadata.get(key) for key in expected} == expected
    assert metadata["general.size_label"].endswith("K")
    tokens = metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == VOCAB and tokens[-1] == f"[PAD{VOCAB - 1}]"
    assert metadata["tokenizer.ggml.token_type"][-1] == 5
    again = Tokenizer.from_gguf(metadata)
    text = "Hello 世界 👋🏽<|im_end|>\n<think> don't"
    assert again.encode(text, special=True) == tokenizer.encode(text, special=True)
    assert set(again.eos_ids) == set(tokenizer.eos_ids)


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


def test_metadata_of_an_extended_context(make_model: MakeModel, tmp_path: Path) -> None:
    def keys(**rope: Any) -> dict[str, Any]:
        export_gguf(Checkpoint(make_model(rope_scaling=rope or None)), tmp_path / "m.gguf", "F16")
        fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
        return {k: fields[f"qwen3.{k}"].contents() for k in ["context_length"] if f"qwen3.{k}" in fields} | {
            k.removeprefix("qwen3.rope.scaling."): f.contents()
            for k, f in fields.items()
            if k.startswith("qwen3.rope.scaling.")
        }

    assert keys() == {"context_length": 512}
    assert keys(type="linear", factor=2.0) == {"context_length": 512, "type": "linear", "factor": 2.0}
    yarn = {"context_length": 1024, "type": "yarn", "factor": 4.0, "original_context_length": 256}
    assert keys(**YARN) == {**yarn, "attn_factor": 1.0}
    stated = keys(**YARN, attention_factor=1.5)
    assert stated == {**yarn, "attn_factor": pytest.approx(1.5 / (0.1 * math.log(4) + 1))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": {**YARN, "beta_fast": 16}},
            r"beta_fast 16\.0; llama\.cpp runs qwen3 files with 32\.0",
        ),
        ({"rope_scaling": {**YARN, "beta_slow": 2}}, r"beta_slow 2\.0"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "truncate False"),
        (
            {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1},
            "sliding_window 100 .* 1 layers",
        ),
    ],
)
def test_what_gguf_readers_would_ignore(
    make_model: MakeModel, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        export_gguf(Checkpoint(make_model(**changes)), tmp_path / "m.gguf", "F16")
    assert not (tmp_path / "m.gguf").exists()


def test_a_window_as_wide_as_the_context_is_none(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model(use_sliding_window=True, sliding_window=512, max_window_layers=0)
    export_gguf(Checkpoint(folder), tmp_path / "m.gguf", "F16")
    assert not any("sliding" in key for key in gguf.GGUFReader(tmp_path / "m.gguf").fields)


@pytest.mark.parametrize(
    ("setting", "exact"),
    [
        ({"chunk_size": 64, "local_size": 16}, 65),
        ({"chunk_size": 64, "local_size": 16, "original_max_position_embeddings": 50}, 50),
        ({"chunk_size": 64, "local_size": 40}, 48),
        ({"chunk_size": 1000, "local_size": 10}, 512),
    ],
)
def test_the_context_ends_where_dual_chunk_attention_begins_to_matter(
    make_model: MakeModel, tmp_path: Path, setting: dict[str, int], exact: int
) -> None:
    """The engine agrees with the reference model up to there, and takes no longer text."""
    checkpoint = Checkpoint(make_model(dual_chunk_attention_config=setting))
    export_gguf(checkpoint, tmp_path / "m.gguf", "F32")
    session = Session.open(tmp_path / "m.gguf")
    assert session.n_ctx == exact
    assert [f"context_length is {exact} instead of 512" in note for note in notes(checkpoint)] == (
        [True] if exact < 512 else []
    )
    tokens = np.random.default_rng(1).integers(0, VOCAB, min(exact, 65)).astype(np.int32)
    expected = load_model(checkpoint)(torch.from_numpy(tokens)[None].long())[0].numpy()
    assert np.abs(session.logits(tokens) - expected).max() < 0.02  # the engine's cache is FP16


def test_outer_types_can_be_chosen(make_model: MakeModel, tmp_path: Path) -> None:
    tied = Checkpoint(make_model())
    for options in ({"token_embedding_type": "Q4_1"}, {"output_tensor_type": "Q4_1"}):
        export_gguf(tied, tmp_path / "m.gguf", "Q4_0", TypeOptions(**options))
        reader = gguf.GGUFReader(tmp_path / "m.gguf")
        assert type_of(reader, "token_embd.weight") == "Q4_1"
        assert not any(t.name == "output.weight" for t in reader.tensors)
    with pytest.raises(UsageError, match="one tensor"):
        export_gguf(tied, tmp_path / "n.gguf", "Q4_0", TypeOptions("F16", "Q8_0"))
    untied = Checkpoint(make_model(name="untied", tie_word_embeddings=False))
    export_gguf(untied, tmp_path / "m.gguf", "Q4_0", TypeOptions("Q4_0", "F16"))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert (type_of(reader, "token_embd.weight"), type_of(reader, "output.weight")) == ("Q4_0", "F16")


def test_bad_input_leaves_nothing_behind(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model()
    target = tmp_path / "out" / "m.gguf"
    with pytest.raises(UsageError, match="--type Q9_9"):
        export_gguf(Checkpoint(folder), target, "Q9_9")
    with pytest.raises(UsageError, match="--token-embedding-type x"):
        export_gguf(Checkpoint(folder), target, "F16", TypeOptions("x"))
    with pytest.raises(OutputError, match="is a folder"):
        export_gguf(Checkpoint(folder), tmp_path, "F16")
    name = "model.layers.1.mlp.down_proj.weight"
    shape = Checkpoint(folder).infos[name].shape
    rewrite(folder, {name: f32_to_bf16(np.full(shape, 1e5, np.float32))})
    with pytest.raises(FormatError, match=r"down_proj.*--type BF16"):
        export_gguf(Checkpoint(folder), target, "F16")
    rewrite(folder, {name: f32_to_bf16(np.full(shape, np.nan, np.float32))})
    with pytest.raises(CheckpointError, match=r"down_proj.*NaN"):
        export_gguf(Checkpoint(folder), target, "Q4_0")
    assert not list((tmp_path / "out").iterdir())


def test_tokenizer_must_fit_the_weights(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="4096 tokens, but the embedding 320 rows"):
        export_gguf(Checkpoint(make_model(vocab_size=320)), tmp_path / "m.gguf", "F16")
