"""Safetensors files: both directions against the reference library, and every way a header can lie."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_quant.errors import CheckpointError
from qwen_quant.safetensors import (
    STORAGE,
    Planned,
    SafetensorsFile,
    SafetensorsWriter,
    bf16_to_f32,
    f32_to_bf16,
    storage_dtype,
)

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A torch tensor as the NumPy array that SafetensorsFile gives for it."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def make(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50).to(TORCH[dtype])


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    planned = [Planned(name, storage_dtype(array), array.shape) for name, array in tensors.items()]
    with SafetensorsWriter(path, planned, {"made by": "a test"}) as writer:
        for name, array in reversed(tensors.items()):
            writer.write(name, array)
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(
        tmp_path / "good.safetensors",
        {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, "i1")},
    )


def with_header(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = len(text) if length is None else length
    path.write_bytes(prefix.to_bytes(8, "little") + text + data)
    return path


def refusal(path: Path) -> str:
    """The message with which opening the file, or reading all of it, fails."""
    with pytest.raises(CheckpointError) as caught:
        file = SafetensorsFile(path)
        for name in file.entries:
            file.read_raw(name)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@settings(max_examples=30, deadline=None)
@given(
    chosen=st.dictionaries(st.text(max_size=6), st.tuples(st.sampled_from(sorted(TORCH)), SHAPES), max_size=5)
)
def test_round_trips_with_the_reference_library(chosen: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    chosen.pop("__metadata__", None)
    tensors = {name: make(dtype, shape) for name, (dtype, shape) in chosen.items()}
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder) / "theirs", Path(folder) / "ours"
        safetensors.torch.save_file(tensors, theirs)
        file = SafetensorsFile(theirs)
        assert set(file.entries) == set(tensors)
        for name, tensor in tensors.items():
            assert file.entries[name].dtype == chosen[name][0]
            assert file.entries[name].shape == tuple(tensor.shape)
            np.testing.assert_array_equal(file.read_raw(name), bits(tensor))
        write(ours, {name: bits(tensor) for name, tensor in tensors.items()})
        loaded = safetensors.torch.load_file(ours)
        assert set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor)


def test_rows_are_read_and_written_in_pieces(tmp_path: Path) -> None:
    array = np.arange(77, dtype=np.int32).reshape(11, 7)
    path = tmp_path / "rows.safetensors"

    def pieces() -> Iterator[np.ndarray]:
        for start in range(0, 11, 4):
            yield array[start : start + 4]

    with SafetensorsWriter(path, [Planned("a", "I32", (11, 7))]) as writer:
        writer.write_rows("a", pieces())
    file = SafetensorsFile(path)
    np.testing.assert_array_equal(file.read_raw("a"), array)
    np.testing.assert_array_equal(file.read_raw("a", 3, 9), array[3:9])
    np.testing.assert_array_equal(file.read_raw("a", 9, 40), array[9:])


def test_metadata_is_kept(good: Path) -> None:
    assert SafetensorsFile(good).metadata == {"format": "pt", "made by": "a test"}


def test_bf16_rounds_as_torch_does() -> None:
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (rng.integers(0, 2**16, 20_000).astype(np.uint32) << 16) | 0x8000
    special = np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38, 1e-45, -1e-40], dtype=np.float32).view(np.uint32)
    values = np.concatenate((patterns, ties, special)).view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(f32_to_bf16(values), expected)
    back = torch.from_numpy(expected).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(bf16_to_f32(expected), back)


def test_bf16_keeps_nan() -> None:
    nans = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000], dtype=np.uint32).view(np.float32)
    assert np.isnan(bf16_to_f32(f32_to_bf16(nans))).all()


def test_every_bf16_pattern_survives() -> None:
    patterns = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    numbers = patterns[~np.isnan(bf16_to_f32(patterns))]
    np.testing.assert_array_equal(f32_to_bf16(bf16_to_f32(numbers)), numbers)


def test_writer_refuses_what_was_not_planned(tmp_path: Path) -> None:
    with (
        pytest.raises(TypeError, match="planned"),
        SafetensorsWriter(tmp_path / "x", [Planned("a", "F32", (2,))]) as writer,
    ):
        writer.write("a", np.zeros(3, dtype=np.float32))
    with (
        pytest.raises(TypeError, match="planned"),
        SafetensorsWriter(tmp_path / "x", [Planned("a", "F32", (2,))]) as writer,
    ):
        writer.write("a", np.zeros(2, dtype=np.int32))


def test_writer_misses_a_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'b' was never written"):
        planned = [Planned("a", "F32", (2,)), Planned("b", "F32", (2,))]
        with SafetensorsWriter(tmp_path / "x", planned) as writer:
            writer.write("a", np.zeros(2, dtype=np.float32))


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 100_000_001, 10_000])
def test_header_length_beyond_the_file(tmp_path: Path, length: int) -> None:
    assert str(length) in refusal(with_header(tmp_path / "x", {}, length=length))


@pytest.mark.parametrize(
    "text", [b"", b"{", b"not json", b"\xff\xfe\x00", b"[" * 50_000, b"{}{}", b"\x00" * 16]
)
def test_header_that_is_not_json(tmp_path: Path, text: bytes) -> None:
    assert "not JSON" in refusal(with_header(tmp_path / "x", text))


@pytest.mark.parametrize("header", [[], 3, None, "x"])
def test_header_that_is_not_an_object(tmp_path: Path, header: Any) -> None:
    assert "not a JSON object" in refusal(with_header(tmp_path / "x", header))


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [-2, -2]},
        {"shape": [2, -2]},
        {"shape": [2.0, 2]},
        {"shape": [True, 4]},
        {"shape": "22"},
        {"shape": None},
        {"shape": [2**62, 2**62]},
        {"shape": [2**70, 0], "data_offsets": [0, 0]},
        {"shape": [2**40, 2**40, 0], "data_offsets": [0, 0]},
        {"shape": [1] * 100 + [4]},
        {"data_offsets": [0, 15]},
        {"data_offsets": [16, 0]},
        {"data_offsets": [-16, 0]},
        {"data_offsets": [8, 24]},
        {"data_offsets": [2**62, 2**62 + 16]},
        {"data_offsets": [0]},
        {"data_offsets": [0, 8, 16]},
        {"data_offsets": {}},
        {"data_offsets": [0.0, 16.0]},
        {"dtype": "F8_E4M3"},
        {"dtype": None},
        {"dtype": ["F32"]},
        {"dtype": {}},
    ],
)
def test_description_that_lies(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = with_header(tmp_path / "x", {"weight": {**ENTRY, **changes}}, bytes(16))
    assert "'weight'" in refusal(path)


@pytest.mark.parametrize("description", [None, 3, [], "F32", {}])
def test_tensor_without_description(tmp_path: Path, description: Any) -> None:
    assert "'weight'" in refusal(with_header(tmp_path / "x", {"weight": description}))


@pytest.mark.parametrize("offsets", [[0, 16], [8, 24], [15, 31]])
def test_tensors_that_overlap(tmp_path: Path, offsets: list[int]) -> None:
    header = {"first": ENTRY, "second": {**ENTRY, "data_offsets": offsets}}
    assert "overlap" in refusal(with_header(tmp_path / "x", header, bytes(32)))


def test_metadata_that_is_no_object(tmp_path: Path) -> None:
    assert "__metadata__" in refusal(
        with_header(tmp_path / "x", {"__metadata__": [1], "weight": ENTRY}, bytes(16))
    )


def test_cut_anywhere(good: Path, tmp_path: Path) -> None:
    whole = good.read_bytes()
    for size in {*range(0, len(whole), 7), len(whole) - 1}:
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(whole[:size])
        refusal(cut)


def test_cut_after_opening(good: Path) -> None:
    file = SafetensorsFile(good)
    good.write_bytes(good.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="ends within tensor 'b'"):
        file.read_raw("b")


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "missing.safetensors")
    assert "cannot be read" in refusal(tmp_path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_byte_gives_arrays_or_one_line(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "x", {"a": np.ones((2, 3), np.float32), "bc": np.ones(4, np.int8)})
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        try:
            file = SafetensorsFile(path)
            for name, entry in file.entries.items():
                assert file.read_raw(name).dtype == STORAGE[entry.dtype]
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
