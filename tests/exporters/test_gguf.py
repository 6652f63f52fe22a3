"""GGUF files: every value decodes to what the checkpoint holds, and nothing half-true is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from helpers.checkpoints import rewrite
from helpers.gguf_files import decoded, type_of

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import CheckpointError, FormatError, OutputError, UsageError
from qwen_quant.exporters.gguf import TypeOptions, export_gguf, plan_file
from qwen_quant.exporters.gguf_tensors import gguf_name
from qwen_quant.grids.gguf import gguf_grid
from qwen_quant.safetensors import f32_to_bf16
from qwen_quant.tokenizer import Tokenizer

VOCAB = 4112  # more rows than the bundled tokenizer has tokens
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "head_dim": None,
    "tie_word_embeddings": False,
}
MakeModel = Callable[..., Checkpoint]


@pytest.mark.parametrize("family", [{}, QWEN2, {"head_dim": 64, "tie_word_embeddings": False}])
@pytest.mark.parametrize("file_type", ["F32", "F16", "BF16"])
def test_float_types_keep_every_value(
    make_model: MakeModel, tmp_path: Path, file_type: str, family: dict[str, Any]
) -> None:
    checkpoint = make_model(**family)
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
    checkpoint = make_model(intermediate_size=112, tie_word_embeddings=False)
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
    checkpoint = make_model()
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


def test_metadata(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model(head_dim=48, rope_theta=5e5, rms_norm_eps=1e-5).folder
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


def test_outer_types_can_be_chosen(make_model: MakeModel, tmp_path: Path) -> None:
    tied = make_model()
    for options in ({"token_embedding_type": "Q4_1"}, {"output_tensor_type": "Q4_1"}):
        export_gguf(tied, tmp_path / "m.gguf", "Q4_0", TypeOptions(**options))
        reader = gguf.GGUFReader(tmp_path / "m.gguf")
        assert type_of(reader, "token_embd.weight") == "Q4_1"
        assert not any(t.name == "output.weight" for t in reader.tensors)
    with pytest.raises(UsageError, match="one tensor"):
        export_gguf(tied, tmp_path / "n.gguf", "Q4_0", TypeOptions("F16", "Q8_0"))
    untied = make_model(name="untied", tie_word_embeddings=False)
    export_gguf(untied, tmp_path / "m.gguf", "Q4_0", TypeOptions("Q4_0", "F16"))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert (type_of(reader, "token_embd.weight"), type_of(reader, "output.weight")) == ("Q4_0", "F16")


def test_bad_input_leaves_nothing_behind(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model().folder
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
        export_gguf(make_model(vocab_size=320), tmp_path / "m.gguf", "F16")
