"""GGUF copies of checkpoint folders, made once so that `run` takes a folder as well as a file."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from qwen_quant.errors import QwenQuantError


def cache_folder() -> Path:
    """Where copies are kept: `$XDG_CACHE_HOME/qwen-quant`, by default under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qwen-quant"


def gguf_of(folder: Path) -> Path:
    """A GGUF file of the checkpoint `folder`: F16, or the integers of a GPTQ checkpoint unchanged.

    The copy is made again when a file of the folder changes, and then the old one is removed. Raises
    QwenQuantError when the folder cannot be exported.
    """
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    target = cache_folder() / f"{place}-{fingerprint(folder)}.gguf"
    if target.is_file():
        return target
    try:
        from qwen_quant.exporters.gguf import export_gguf
    except ModuleNotFoundError as error:
        raise QwenQuantError(
            f"{folder}: is a checkpoint folder, and turning it into GGUF needs {error.name}; "
            "pip install 'qwen-quant[quantize]', or name a .gguf file"
        ) from None
    from qwen_quant.checkpoint import Checkpoint

    if sys.stderr.isatty():
        print(f"qwen-quant: copying {folder} to {target} (once)", file=sys.stderr)
    export_gguf(Checkpoint(folder), target)
    for old in cache_folder().glob(f"{place}-*.gguf"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


def fingerprint(folder: Path) -> str:
    """Changes with the name, size or time of any file in `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
