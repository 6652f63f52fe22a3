"""Checkpoint folders: what is incomplete or does not fit together is one line that names file and tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_quant.checkpoint import INDEX, SINGLE, Checkpoint, TensorSource, resolve_model
from qwen_quant.errors import CheckpointError, ConfigError, QwenQuantError
from qwen_quant.grids.gptq import IntGrid, pack
from qwen_quant.safetensors import Planned, SafetensorsFile, SafetensorsWriter, bf16_to_f32, storage_dtype

Maker = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj."


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(QwenQuantError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 1
    return message


def read_all(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for info in checkpoint.spec.tensors():
        checkpoint.read(info.name)


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """Rewrite a single-file checkpoint after `change` has altered its raw tensors in place."""
    path = folder / SINGLE
    file = SafetensorsFile(path)
    tensors = {name: file.read_raw(name) for name in file.entries}
    change(tensors)
    planned = [Planned(name, storage_dtype(array), array.shape) for name, array in tensors.items()]
    with SafetensorsWriter(path, planned) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> Path:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_come_back_as_written(make_checkpoint: Maker, shards: int) -> None:
    folder = make_checkpoint(shards=shards)
    checkpoint = Checkpoint(folder)
    for info in checkpoint.spec.tensors():
        values = checkpoint.read(info.name)
        assert values.dtype == np.float32
        assert values.shape == info.shape
        np.testing.assert_array_equal(values, bf16_to_f32(checkpoint.source.read_raw(info.name)))
        assert checkpoint.source.dtype(info.name) == "BF16"


def test_pieces_equal_the_whole(make_checkpoint: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint(make_checkpoint()).source
    whole = source.read("model.embed_tokens.weight")
    monkeypatch.setattr("qwen_quant.tensor_source.CHUNK_BYTES", 1000)
    pieces = list(source.chunks("model.embed_tokens.weight"))
    assert len(pieces) > 10
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    rows = np.array([0, 3, 4, 100, 319])
    np.testing.assert_array_equal(source.read_rows("model.embed_tokens.weight", rows), whole[rows])


def test_missing_shard(make_checkpoint: Maker) -> None:
    folder = make_checkpoint(shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors: this shard is missing" in refusal(lambda: Checkpoint(folder))


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "", ".", ".."]
)
def test_index_that_points_outside(make_checkpoint: Maker, shard: str) -> None:
    folder = make_checkpoint(shards=2)
    (folder.parent / "outside.safetensors").write_bytes(
        (folder / "model-00001-of-00002.safetensors").read_bytes()
    )
    edit_index(folder, lambda names: names.update({"model.norm.weight": shard}))
    assert "missing" in refusal(lambda: Checkpoint(folder))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "[" * 100_000, "null"]
)
def test_index_that_is_none(make_checkpoint: Maker, text: str) -> None:
    folder = make_checkpoint(shards=2)
    (folder / INDEX).write_text(text)
    assert INDEX in refusal(lambda: Checkpoint(folder))


def test_index_that_names_the_wrong_shard(make_checkpoint: Maker) -> None:
    folder = make_checkpoint(shards=2)
    edit_index(folder, lambda names: names.update({"model.norm.weight": "model-00002-of-00002.safetensors"}))
    assert "'model.norm.weight' is missing" in refusal(lambda: read_all(folder))


def test_a_single_file_comes_before_an_index(make_checkpoint: Maker) -> None:
    """As in transformers: an index left over from an earlier download must not hide the whole file."""
    folder = make_checkpoint()
    (folder / INDEX).write_text('{"weight_map": {"model.norm.weight": "gone.safetensors"}}')
    read_all(folder)


def test_tensor_missing(make_checkpoint: Maker) -> None:
    folder = rewrite(make_checkpoint(), lambda tensors: tensors.pop(Q_PROJ + "weight") is None)
    assert f"{Q_PROJ}weight' is missing" in refusal(lambda: Checkpoint(folder))


def test_wrong_shape(make_checkpoint: Maker) -> None:
    def transpose(tensors: dict[str, np.ndarray]) -> None:
        tensors[Q_PROJ + "weight"] = np.ascontiguousarray(tensors[Q_PROJ + "weight"].T)

    message = refusal(lambda: Checkpoint(rewrite(make_checkpoint(), transpose)))
    assert f"{Q_PROJ}weight' has shape [64, 128], config.json says [128, 64]" in message


@pytest.mark.parametrize(("pattern", "count"), [(0x7FC0, 1), (0x7F80, 2), (0xFF80, 3)])
def test_values_that_are_not_finite(make_checkpoint: Maker, pattern: int, count: int) -> None:
    def poison(tensors: dict[str, np.ndarray]) -> None:
        tensors[Q_PROJ + "weight"].reshape(-1)[:count] = pattern

    folder = rewrite(make_checkpoint(), poison)
    assert f"{Q_PROJ}weight' holds {count} NaN or infinite" in refusal(lambda: read_all(folder))


def test_integers_where_floats_belong(make_checkpoint: Maker) -> None:
    def to_ints(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"] = np.ones(64, dtype=np.int32)

    assert "dtype I32" in refusal(lambda: read_all(rewrite(make_checkpoint(), to_ints)))


def test_pickles_are_not_read(make_checkpoint: Maker) -> None:
    folder = make_checkpoint()
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    assert "pickled" in refusal(lambda: Checkpoint(folder))


def test_folder_without_weights(make_checkpoint: Maker) -> None:
    folder = make_checkpoint()
    (folder / SINGLE).unlink()
    assert f"{SINGLE}: not found" in refusal(lambda: Checkpoint(folder))


def test_truncated_weights(make_checkpoint: Maker) -> None:
    folder = make_checkpoint()
    whole = (folder / SINGLE).read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        (folder / SINGLE).write_bytes(whole[:size])
        assert SINGLE in refusal(lambda: read_all(folder))


def test_a_file_or_nothing_where_a_folder_belongs(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "x.gguf" in refusal(lambda: Checkpoint(tmp_path / "x.gguf"))
    assert "config.json" in refusal(lambda: Checkpoint(tmp_path / "nothing"))


@pytest.mark.parametrize("name", ["no-such-folder", "./a/b", "x.gguf", "a/b/c", "~nobody-here/x", "x" * 5000])
def test_models_that_do_not_exist(name: str) -> None:
    assert name[:200] in refusal(lambda: resolve_model(name))


def test_the_word_reference_means_the_bundled_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert resolve_model("reference").name == "reference"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reference").mkdir()
    assert resolve_model("reference") == Path("reference")


def quantized(folder: Path, **settings: Any) -> Path:
    """Turn q_proj of layer 0 into 4-bit integers by plain rounding, as a GPTQ checkpoint stores them."""
    grid = IntGrid(bits=4, group_size=32)
    config = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq"}
    config["quantization_config"] = {**stored, **settings}
    (folder / "config.json").write_text(json.dumps(config))

    def change(tensors: dict[str, np.ndarray]) -> None:
        packed = pack(grid.plain_rounding(bf16_to_f32(tensors.pop(Q_PROJ + "weight"))))
        tensors.update({f"{Q_PROJ}{part}": array for part, array in vars(packed).items()})

    return rewrite(folder, change)


def test_integers_are_decoded(make_checkpoint: Maker) -> None:
    weights = Checkpoint(make_checkpoint(name="plain")).read(Q_PROJ + "weight")
    checkpoint = Checkpoint(quantized(make_checkpoint()))
    assert checkpoint.is_quantized(Q_PROJ + "weight")
    assert not checkpoint.is_quantized("model.layers.1.self_attn.q_proj.weight")
    expected = IntGrid(bits=4, group_size=32).plain_rounding(weights).decode()
    np.testing.assert_array_equal(checkpoint.read(Q_PROJ + "weight"), expected)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "awq"}, "'awq'"),
        ({"quant_method": None}, "quant_method"),
        ({"bits": 5}, "5"),
        ({"bits": 4.0}, "4.0"),
        ({"bits": "4"}, "'4'"),
        ({"bits": [4]}, "[4]"),
        ({"bits": None}, "None"),
        ({"group_size": 33}, "33"),
        ({"group_size": {}}, "{}"),
        ({"checkpoint_format": "marlin"}, "'marlin'"),
        ({"checkpoint_format": []}, "[]"),
    ],
)
def test_quantization_settings_that_are_not_understood(
    make_checkpoint: Maker, settings: dict[str, Any], named: str
) -> None:
    folder = quantized(make_checkpoint(), **settings)
    with pytest.raises(ConfigError):
        Checkpoint(folder)
    assert named in refusal(lambda: Checkpoint(folder))


@pytest.mark.parametrize("value", [3, [], "gptq"])
def test_quantization_config_that_is_no_object(make_checkpoint: Maker, value: Any) -> None:
    folder = make_checkpoint(quantization_config=value)
    assert "quantization_config" in refusal(lambda: Checkpoint(folder))


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_integers_without_their_parts(make_checkpoint: Maker, part: str) -> None:
    folder = rewrite(quantized(make_checkpoint()), lambda tensors: tensors.pop(Q_PROJ + part) is None)
    assert Q_PROJ + part in refusal(lambda: read_all(folder))


def test_groups_in_order_need_no_index(make_checkpoint: Maker) -> None:
    folder = quantized(make_checkpoint())
    before = Checkpoint(folder).read(Q_PROJ + "weight")
    rewrite(folder, lambda tensors: tensors.pop(Q_PROJ + "g_idx") is None)
    np.testing.assert_array_equal(Checkpoint(folder).read(Q_PROJ + "weight"), before)


@pytest.mark.parametrize(
    ("part", "spoil"),
    [
        ("qweight", lambda a: a[:-1]),
        ("qweight", lambda a: a.astype(np.float32)),
        ("qzeros", lambda a: a.T.copy()),
        ("qzeros", lambda a: a.astype(np.int64)),
        ("scales", lambda a: a[:, :-1].copy()),
        ("scales", lambda a: a.astype(np.int32)),
        ("scales", lambda a: a * np.float16(np.nan)),
        ("g_idx", lambda a: a + 5),
        ("g_idx", lambda a: a - 1),
        ("g_idx", lambda a: a[:7].copy()),
        ("g_idx", lambda a: a.astype(np.float32)),
    ],
)
def test_integers_that_do_not_fit_together(
    make_checkpoint: Maker, part: str, spoil: Callable[[np.ndarray], np.ndarray]
) -> None:
    folder = quantized(make_checkpoint())
    rewrite(folder, lambda tensors: tensors.update({Q_PROJ + part: spoil(tensors[Q_PROJ + part])}))
    assert Q_PROJ + part in refusal(lambda: read_all(folder))


def test_unknown_tensor(make_checkpoint: Maker) -> None:
    source = TensorSource(make_checkpoint())
    assert "nonsense" not in source
    with pytest.raises(CheckpointError, match="'nonsense' is missing"):
        source.read("nonsense")
