"""Byte-level BPE as Qwen2 has it: an object of the tokenizers library, or a vocabulary that is quick to build."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from qwen_quant import _core

# How Qwen2, Qwen2.5 and Qwen3 cut text into words before merging; llama.cpp calls it pre-tokenizer "qwen2".
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen2_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Split by QWEN2_PATTERN, then spell bytes as characters."""
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def split_merges(merges: Iterable[str]) -> list[tuple[str, str]]:
    """Merges ("left right") as pairs. Raises ValueError for one that is not two tokens."""
    return [(left, right) for merge in merges for left, right in (merge.split(" ", 1),)]


def byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """A Qwen2 tokenizer over a vocabulary and merges, without added tokens.

    Raises whatever the library raises when a merge names a token that is not in `vocab`.
    """
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = qwen2_pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


@functools.cache
def _word_cutters() -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    """What makes words of a text, before merges are looked at."""
    return normalizers.NFC(), qwen2_pre_tokenizer()


@dataclass(frozen=True)
class StoredVocabulary:
    """A vocabulary as GGUF files store it: spellings in id order, which of them are no tokens, merges
    ("left right"), and the added tokens by their ids.

    Words are encoded by our own byte-pair merges, which gives the ids of the tokenizers library: its object takes
    ten times as long to make of 150,000 merges.
    """

    tokens: list[str]
    absent: frozenset[int]
    merges: list[str]
    added: dict[int, AddedToken]

    @functools.cached_property
    def pairs(self) -> _core.BytePairs:
        """Raises ValueError when a merge names what is no token, TypeError for text that is no UTF-8."""
        return _core.BytePairs(self.tokens, self.merges, sorted(self.absent))

    def backend(self) -> tokenizers.Tokenizer:
        """The same as an object of the tokenizers library."""
        vocab = {token: i for i, token in enumerate(self.tokens) if i not in self.absent}
        backend = byte_level_bpe(vocab, split_merges(self.merges))
        backend.add_tokens(list(self.added.values()))
        return backend

    def spelling(self, token: int) -> str | None:
        """None for an id that is no token."""
        known = 0 <= token < len(self.tokens) and token not in self.absent
        return self.tokens[token] if known else None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, in which nothing is an added token."""
        normalizer, pre_tokenizer = _word_cutters()
        words = pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))
        return self.pairs.encode([word for word, _ in words])

    def encode_with_added(self, text: str) -> list[int]:
        """Ids of `text` with the added tokens that are spelled in it; of several at one place the longest."""
        ids: list[int] = []
        last = 0
        for match in self._added_pattern.finditer(text):
            ids += self.encode(text[last : match.start()])
            ids.append(self._ids_of_added[match.group()])
            last = match.end()
        return ids + self.encode(text[last:])

    @functools.cached_property
    def _ids_of_added(self) -> dict[str, int]:
        return {token.content: i for i, token in self.added.items() if token.content}

    @functools.cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        spellings = sorted(self._ids_of_added, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, spellings)) or r"(?!)")
