"""GPT-2's spelling of bytes as characters, in which byte-level vocabularies and merges are written down."""

from __future__ import annotations

import functools


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """Printable Latin-1 stands for itself, the other bytes follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@functools.cache
def _characters_of_latin1() -> dict[int, str]:
    return {byte: character for character, byte in _bytes_of_characters().items()}


def spelling_to_bytes(spelling: str) -> bytes:
    """The bytes a byte-level token stands for; a spelling outside that alphabet stands for its own UTF-8."""
    table = _bytes_of_characters()
    try:
        return bytes([table[character] for character in spelling])
    except KeyError:
        return spelling.encode("utf-8")


def bytes_to_spelling(token: bytes) -> str:
    """How `token` is written in a vocabulary."""
    return token.decode("latin-1").translate(_characters_of_latin1())
