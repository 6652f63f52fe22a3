"""Reading GGUF: against the gguf package, and files that are cut, damaged or hostile."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_quant import _core
from qwen_quant.errors import FormatError, QwenQuantError
from qwen_quant.runtime.gguf import GGUFFile
from qwen_quant.runtime.session import Session

TinyModels = Callable[..., Any]


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(n_tensors: int = 0, n_keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)


def tensor(name: bytes, dims: list[int], tensor_type: int = 0, offset: int = 0) -> bytes:
    return (
        string(name)
        + struct.pack("<I", len(dims))
        + struct.pack(f"<{len(dims)}Q", *dims)
        + struct.pack("<IQ", tensor_type, offset)
    )


def key(name: bytes, value_type: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", value_type) + value


HOSTILE = {
    "empty": b"",
    "no magic": b"GGML" + bytes(40),
    "version 1": header(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2^60 keys": header(n_keys=2**60),
    "2^64-1 tensors": header(n_tensors=2**64 - 1),
    "key length 2^63": header(n_keys=1) + struct.pack("<Q", 2**63) + bytes(64),
    "string of 2^64-1": header(n_keys=1) + key(b"a", 8, struct.pack("<Q", 2**64 - 1)),
    "unknown value type": header(n_keys=1) + key(b"a", 99, bytes(16)),
    "boolean 7": header(n_keys=1) + key(b"a", 7, b"\x07"),
    "array of 2^62 u64": header(n_keys=1) + key(b"a", 9, struct.pack("<IQ", 10, 2**62) + bytes(64)),
    "array of 2^61 strings": header(n_keys=1) + key(b"a", 9, struct.pack("<IQ", 8, 2**61) + bytes(64)),
    "array of unknown": header(n_keys=1) + key(b"a", 9, struct.pack("<IQ", 77, 1) + bytes(64)),
    "deep arrays": header(n_keys=1) + key(b"a", 9, struct.pack("<IQ", 9, 1) * 5000),
    "key twice": header(n_keys=2) + key(b"a", 0, b"1") * 2,
    "alignment 0": header(n_keys=1) + key(b"general.alignment", 4, struct.pack("<I", 0)),
    "alignment 48": header(n_keys=1) + key(b"general.alignment", 4, struct.pack("<I", 48)),
    "alignment text": header(n_keys=1) + key(b"general.alignment", 8, string(b"32")),
    "no name": header(n_tensors=1) + tensor(b"", [4]) + bytes(64),
    "no dims": header(n_tensors=1) + tensor(b"t", []) + bytes(64),
    "five dims": header(n_tensors=1) + tensor(b"t", [1] * 5) + bytes(64),
    "zero dim": header(n_tensors=1) + tensor(b"t", [4, 0]) + bytes(64),
    "dims overflow": header(n_tensors=1) + tensor(b"t", [2**32, 2**32]) + bytes(64),
    "dims wrap to little": header(n_tensors=1) + tensor(b"t", [2**63, 2, 1, 4]) + bytes(64),
    "unknown tensor type": header(n_tensors=1) + tensor(b"t", [4], 4) + bytes(64),
    "type 2^32-1": header(n_tensors=1) + tensor(b"t", [4], 2**32 - 1) + bytes(64),
    "ragged block": header(n_tensors=1) + tensor(b"t", [33], 2) + bytes(64),
    "misaligned": header(n_tensors=1) + tensor(b"t", [4], 0, 16) + bytes(200),
    "offset 2^64-32": header(n_tensors=1) + tensor(b"t", [4], 0, 2**64 - 32) + bytes(200),
    "past the end": header(n_tensors=1) + tensor(b"t", [400]) + bytes(200),
    "tensor twice": header(n_tensors=2) + tensor(b"t", [4]) + tensor(b"t", [4], 0, 32) + bytes(200),
    "overlap": header(n_tensors=2) + tensor(b"t", [16]) + tensor(b"u", [4], 0, 32) + bytes(200),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(FormatError, match=r"bad\.gguf: .+: .+; .+") as error:
        GGUFFile(path)
    assert "\n" not in str(error.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="No such file"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(FormatError, match="not a regular file"):
        GGUFFile(tmp_path)


def test_a_file_cut_anywhere(tiny_model: TinyModels, tmp_path: Path) -> None:
    data = tiny_model("qwen3", "Q4_0").path.read_bytes()
    path = tmp_path / "cut.gguf"
    header_end = GGUFFile(tiny_model("qwen3", "Q4_0").path).tensors["token_embd.weight"].offset
    cuts = [*range(0, header_end, 7), *range(header_end, len(data), 997), len(data) - 1]
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(FormatError, match=r"cut\.gguf"):
            Session.open(path)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(edits=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_headers_never_crash(
    tiny_model: TinyModels, tmp_path: Path, edits: list[tuple[int, int]]
) -> None:
    data = bytearray(tiny_model("qwen3", "Q4_0").path.read_bytes())
    for position, value in edits:
        data[position] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    try:
        session = Session.open(path, n_threads=1)
        session.metadata  # noqa: B018
        session.prefill([1, 2, 3])
    except QwenQuantError:
        pass


def test_metadata_as_the_gguf_package_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "meta.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    expected: dict[str, Any] = {
        "a.u8": 200, "a.i8": -100, "a.u16": 60000, "a.i16": -30000, "a.u32": 2**32 - 1, "a.i32": -(2**31),
        "a.u64": 2**64 - 1, "a.i64": -(2**63), "a.f32": 0.5, "a.f64": 0.1, "a.yes": True, "a.text": "通义 ☃",
        "a.ints": [1, -2, 3], "a.floats": [0.5, 1.5], "a.words": ["x", "", "字"], "a.flags": [True, False],
    }  # fmt: skip
    add = {
        "a.u8": writer.add_uint8, "a.i8": writer.add_int8, "a.u16": writer.add_uint16,
        "a.i16": writer.add_int16,
        "a.u32": writer.add_uint32, "a.i32": writer.add_int32, "a.u64": writer.add_uint64,
        "a.i64": writer.add_int64, "a.f32": writer.add_float32, "a.f64": writer.add_float64,
        "a.yes": writer.add_bool, "a.text": writer.add_string,
    }  # fmt: skip
    for name, value in expected.items():
        add.get(name, writer.add_array)(name, value)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("t", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    assert file.metadata == {"general.architecture": "qwen3", **expected}
    assert file.tensors["t"].shape == (3, 4)
    np.testing.assert_array_equal(file.read_tensor("t"), values)
    raw = file.raw("t")
    del file
    np.testing.assert_array_equal(raw.view(np.float32), values.reshape(-1))
    assert not raw.flags.writeable


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "bytes.gguf"
    path.write_bytes(header(n_keys=1) + key(b"k", 8, string(b"a\xff")))
    assert GGUFFile(path).metadata == {"k": "a\udcff"}


def test_tensors_of_every_type(tiny_model: TinyModels) -> None:
    for tensor_type in _core.matmul_types():
        model = tiny_model("qwen2", tensor_type, tied=False, hidden_size=256, intermediate_size=256)
        file = GGUFFile(model.path)
        for name, weight in (
            ("output.weight", model.reference.lm_head.weight),
            ("blk.1.ffn_down.weight", model.reference.model.layers[1].mlp.down_proj.weight),
        ):
            np.testing.assert_array_equal(file.read_tensor(name), weight.detach().numpy())


def test_tensors_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "iq3s.gguf"
    path.write_bytes((header(n_tensors=1) + tensor(b"t", [256], 21)).ljust(64, b"\0") + bytes(160))
    file = GGUFFile(path)
    assert file.tensors["t"].type == "IQ3_S"
    with pytest.raises(FormatError, match="cannot decode IQ3_S"):
        file.read_tensor("t")
    with pytest.raises(FormatError, match="'u': missing"):
        file.read_tensor("u")


def test_a_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    words = b"".join(string(b"token%d" % i) for i in range(151_936))
    path.write_bytes(header(n_keys=1) + key(b"v", 9, struct.pack("<IQ", 8, 151_936) + words))
    start = time.process_time()
    assert len(GGUFFile(path).metadata["v"]) == 151_936
    assert time.process_time() - start < 0.3


def rewritten(source: Path, target: Path, changes: dict[bytes, bytes]) -> Path:
    data = source.read_bytes()
    for old, new in changes.items():
        assert len(old) == len(new) and old in data
        data = data.replace(old, new)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({b"qwen3": b"llama"}, "'llama' is not supported"),
        ({b"blk.1.ffn_up.weight": b"blk.1.ffn_uq.weight"}, r"tensor 'blk\.1\.ffn_up\.weight': missing"),
        ({b"qwen3.block_count": b"qwen3.block_cound"}, r"key 'qwen3\.block_count': missing"),
        ({b"qwen3.feed_forward_length\x04\0\0\0\xc0": b"qwen3.feed_forward_length\x04\0\0\0\xe0"},
         r"'blk\.0\.ffn_gate\.weight': has shape \[192, 128\], the configuration asks for \[224, 128\]"),
        ({b"qwen3.block_count\x04\0\0\0\x02": b"qwen3.block_count\x04\0\0\0\x01"},
         r"'blk\.1\..*': has no place"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit(
    tiny_model: TinyModels, tmp_path: Path, changes: dict[bytes, bytes], message: str
) -> None:
    path = rewritten(tiny_model("qwen3", "Q4_0").path, tmp_path / "odd.gguf", changes)
    with pytest.raises(FormatError, match=message):
        Session.open(path)


def test_weights_that_are_not_finite(tiny_model: TinyModels, tmp_path: Path) -> None:
    source = tiny_model("qwen3", "F32").path
    info = GGUFFile(source).tensors["blk.1.attn_output.weight"]
    data = bytearray(source.read_bytes())
    data[info.offset : info.offset + info.nbytes] = np.full(info.nbytes // 4, np.nan, np.float32).tobytes()
    path = tmp_path / "nan.gguf"
    path.write_bytes(data)
    with pytest.raises(QwenQuantError, match="not finite enters layer 1"):
        Session.open(path).prefill([1, 2, 3])
