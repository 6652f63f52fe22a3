"""Qwen (1)'s vocabulary file `qwen.tiktoken`: each line a token's bytes in base64 and its rank.

Such a file has no merges: two neighbours are joined when their bytes together are a token, the lowest rank first.
Each token's merge can be found again by doing that with the tokens of lower ranks only.
"""

from __future__ import annotations

import base64
from pathlib import Path

from qwen_quant.byte_level import bytes_to_spelling
from qwen_quant.errors import ConfigError

FILE_NAME = "qwen.tiktoken"
# Named in the checkpoints' code only; their ids follow those of the file.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{index}|>" for index in range(205)),
)
_DOWNLOAD = "download the checkpoint's tokenizer files again"


def read_ranks(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, byte-level spelled, in the order of the ranks. Raises ConfigError naming the line."""
    ranks = _parse(path)
    merges = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        halves = _halves(token, rank, ranks)
        if halves is None:
            raise ConfigError(f"{path}: token {token!r} is not two tokens of lower ranks; {_DOWNLOAD}")
        merges.append((bytes_to_spelling(halves[0]), bytes_to_spelling(halves[1])))
    return {bytes_to_spelling(token): rank for token, rank in ranks.items()}, merges


def _parse(path: Path) -> dict[bytes, int]:
    """Ranks by token, in their order."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {_DOWNLOAD}") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ConfigError(
                f"{path}: line {number} is not a token in base64 and its rank; {_DOWNLOAD}"
            ) from None
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if list(ranks.values()) != list(range(len(lines))):
        raise ConfigError(
            f"{path}: {len(lines)} lines do not have the ranks 0 to {len(lines) - 1}; {_DOWNLOAD}"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ConfigError(f"{path}: has no token for byte {missing[0]}; {_DOWNLOAD}")
    return ranks


def _halves(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that join last in `token`; None when tokens of lower ranks do not lead there."""
    parts = [token[i : i + 1] for i in range(len(token))]
    joined = [
        ranks.get(token[i : i + 2], rank) for i in range(len(token) - 1)
    ]  # rank of each part and the next
    while len(parts) > 2:
        lowest = min(joined)
        if lowest >= rank:
            return None
        at = joined.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del joined[at]
        for i in (at - 1, at):
            if 0 <= i < len(joined):
                joined[i] = ranks.get(parts[i] + parts[i + 1], rank)
    return (parts[0], parts[1]) if len(parts) == 2 else None
