"""A context on disk: what a model computed of a prompt, so that it is not read again.

The file holds MAGIC, the length of a JSON header (4 bytes, little-endian as all numbers are) and that header, the token
ids (int32), and for each layer its keys and values as `Engine.read_kv` gives them, after their length (8 bytes) and
CRC-32.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from qwen_quant.errors import FormatError, QwenQuantError
from qwen_quant.files import atomic_file
from qwen_quant.runtime.gguf import GGUFFile
from qwen_quant.runtime.session import Session

MAGIC = b"qwen-quant prompt cache 3\n"
OPTION = "--prompt-cache"
MAX_HEADER = 1 << 16
LAYER = struct.Struct("<QI")  # bytes and CRC-32
SAMPLE = 4096  # bytes of each tensor that stand for it


def fingerprint(file: GGUFFile) -> str:
    """Changes with anything in the header of a GGUF file, its size, and its weights.

    Of each tensor only the first and last bytes are looked at, because reading them all takes as long as the
    prompt that is to be saved.
    """
    digest = hashlib.sha256(str(file.core.size).encode())
    header = min((tensor.offset for tensor in file.tensors.values()), default=0)
    with open(file.path, "rb") as stream:
        digest.update(stream.read(header))
    for name in file.tensors:
        data = file.raw(name)
        digest.update(data[:SAMPLE].tobytes() + data[-SAMPLE:].tobytes())
    return digest.hexdigest()


def _header(session: Session, n_tokens: int) -> dict[str, Any]:
    engine = session.native(OPTION)
    assert isinstance(session.file, GGUFFile)
    return {
        "model": fingerprint(session.file),
        "architecture": engine.architecture,
        "n_layers": engine.n_layers,
        "cache_type": engine.kv_type,
        "n_tokens": n_tokens,
    }


def save(session: Session, path: str | os.PathLike[str], n_tokens: int | None = None) -> None:
    """Writes the first `n_tokens` of the context (None: all) to `path`, whole or not at all.

    Raises OutputError when it cannot be written.
    """
    n = session.n_past if n_tokens is None else n_tokens
    header = json.dumps(_header(session, n)).encode()
    with atomic_file(Path(path), OPTION) as partial, open(partial, "wb") as out:
        out.write(MAGIC + struct.pack("<I", len(header)) + header)
        out.write(np.asarray(session.tokens[:n], dtype="<i4").tobytes())
        engine = session.native(OPTION)
        for layer in range(engine.n_layers):
            data = engine.read_kv(layer, n).data
            out.write(LAYER.pack(data.nbytes, zlib.crc32(data)))
            out.write(data)


def load(session: Session, path: str | os.PathLike[str]) -> None:
    """Makes the context what `save` wrote to `path`.

    Raises FormatError, with the context empty, for another model's or cache type's file, one that does not fit
    into the context, and one that is damaged or something else.
    """
    session.reset()
    try:
        with open(path, "rb") as stream:
            _load(session, path, stream)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); name another with {OPTION}") from None


def _load(session: Session, path: str | os.PathLike[str], stream: BinaryIO) -> None:
    if stream.read(len(MAGIC)) != MAGIC:
        raise FormatError(f"{path}: is no prompt cache of this version; name another file with {OPTION}")
    found = _read_header(stream)
    n = found.get("n_tokens")
    damaged = FormatError(f"{path}: is cut or damaged; delete it, and it is written again")
    if not isinstance(n, int) or n < 1:
        raise damaged
    for key, wanted in _header(session, n).items():
        if found.get(key) != wanted:
            what = {"model": "model file", "cache_type": "cache type"}.get(key, key)
            raise FormatError(
                f"{path}: was made with another {what}; delete it, or name another with {OPTION}"
            )
    if n > session.n_ctx:
        raise FormatError(
            f"{path}: its {n} tokens do not fit into the context of {session.n_ctx}; name another with {OPTION}"
        )
    data = _read(stream, 4 * n)
    tokens = np.frombuffer(data or b"", "<i4")
    if data is None or tokens.min() < 0 or tokens.max() >= session.n_vocab:
        raise damaged
    try:
        session.restore(tokens.tolist(), _layers(stream, session.native(OPTION).n_layers))
    except QwenQuantError:  # a layer is not as long as it says, or as its model wants it
        raise damaged from None


def _layers(stream: BinaryIO, n_layers: int) -> Iterator[npt.NDArray[np.uint8]]:
    for _ in range(n_layers):
        head = _read(stream, LAYER.size)
        size, checksum = LAYER.unpack(head) if head else (0, 0)
        data = _read(stream, size)
        if not data or zlib.crc32(data) != checksum:
            return
        yield np.frombuffer(data, np.uint8)


def _read(stream: BinaryIO, size: int) -> bytes | None:
    """None where the file has no `size` bytes any more."""
    left = os.fstat(stream.fileno()).st_size - stream.tell()
    return stream.read(size) if size <= left else None


def _read_header(stream: BinaryIO) -> dict[str, Any]:
    """Empty for one that is not as it should be."""
    size = int.from_bytes(stream.read(4), "little")
    try:
        found = json.loads(stream.read(size)) if size <= MAX_HEADER else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
