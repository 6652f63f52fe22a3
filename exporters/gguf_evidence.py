"""What the check of a GGUF file found, stored in the file itself.

Metadata lies before the tensors, and the check runs when all of them are written. So the keys are written first with
values of the same width, and get their own in place.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

# Values of a file that was not checked.
_UNKNOWN: dict[str, float | int] = {
    "kld_mean": float("nan"),
    "kld_max": float("nan"),
    "top1_agreement": float("nan"),
    "tokens": 0,
    "greedy_tokens": 0,
    "greedy_agreement": float("nan"),
}
_HEAD = 1 << 16  # the keys stand at the very beginning


def reserve(writer: gguf.GGUFWriter) -> None:
    """Add the keys `qwen_quant.check.*`; before the others, so that no string can be taken for one of them."""
    for name, value in _UNKNOWN.items():
        key = f"qwen_quant.check.{name}"
        if isinstance(value, float):
            writer.add_float64(key, value)
        else:
            writer.add_int64(key, value)


def fill(path: Path, found: Mapping[str, Any]) -> None:
    """Give the reserved keys of a written file the values in `found`; those it lacks stay as they are."""
    with path.open("r+b") as file:
        head = file.read(_HEAD)
        for name in _UNKNOWN.keys() & found.keys():
            whole = isinstance(_UNKNOWN[name], int)
            kind = gguf.GGUFValueType.INT64 if whole else gguf.GGUFValueType.FLOAT64
            key = f"qwen_quant.check.{name}".encode()
            # https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: length and letters, type, value
            entry = struct.pack("<Q", len(key)) + key + struct.pack("<I", kind)
            file.seek(head.index(entry) + len(entry))
            file.write(struct.pack("<q" if whole else "<d", found[name]))
