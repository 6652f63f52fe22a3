"""Byte-level BPE as Qwen2 has it: the tokenizers library, given all of a vocabulary or the part that texts need."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import re
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from qwen_quant import _core

# How Qwen2, Qwen2.5 and Qwen3 cut text into words before merging; llama.cpp calls it pre-tokenizer "qwen2".
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Token types as GGUF numbers them.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_CONTROL = bytes([CONTROL])
_ADDED = re.compile(b"[%c%c]" % (CONTROL, USER_DEFINED))
_IS_TOKEN = bytes(kind != UNUSED for kind in range(256))
# From here on all of a stored vocabulary is needed, or looking for what is needed takes as long as making all of it.
LONG_TEXT = 1 << 14  # characters
LARGE_SHARE = 4  # a fourth of the tokens


@functools.cache
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


class Vocabulary:
    """A whole vocabulary, as an object of the tokenizers library."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        # The same model without the added tokens: nothing in a text can become one of them.
        self._plain = tokenizers.Tokenizer(backend.model)
        self._plain.normalizer = backend.normalizer
        self._plain.pre_tokenizer = backend.pre_tokenizer

    @functools.cached_property
    def added_tokens(self) -> dict[int, AddedToken]:
        """Tokens that no merge leads to, by their ids."""
        return dict(self.backend.get_added_tokens_decoder())

    def encoding(self, text: str, added: bool) -> tokenizers.Encoding:
        """What the library makes of `text`; with `added`, tokens of that kind are found in it."""
        return (self.backend if added else self._plain).encode(text, add_special_tokens=False)

    def encode(self, text: str, added: bool) -> list[int]:
        """Ids of `text`; with `added`, tokens of that kind are found in it."""
        ids: list[int] = self.encoding(text, added).ids
        return ids

    def spelling(self, token: int) -> str | None:
        """None for an id that is no token."""
        found: str | None = self.backend.id_to_token(token) if token >= 0 else None
        return found

    def token_id(self, spelling: str) -> int | None:
        """None for what is no token."""
        found: int | None = self.backend.token_to_id(spelling)
        return found

    def tokens(self) -> list[str]:
        """Spellings in id order; an id nobody uses is `[PAD{id}]`."""
        vocab = self.backend.get_vocab(with_added_tokens=True)
        spelled = {token: spelling for spelling, token in vocab.items()}
        return [spelled.get(i, f"[PAD{i}]") for i in range(max(spelled) + 1)]

    def merges(self) -> list[tuple[str, str]]:
        """The merges in the order of their ranks."""
        stored = json.loads(self.backend.model.__getstate__())["merges"]
        pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in stored)
        return [(left, right) for left, right in pairs]


class StoredVocabulary:
    """The vocabulary of a GGUF file, of which the library is given what the texts so far can need.

    Its object takes 0.4 s and 70 MB for 150,000 merges. But a merge can only happen where the token it makes is spelled
    in the text: those with bytes that do not stand together there, by threes, are left out, which changes no id.
    """

    def __init__(self, tokens: _core.Strings, types: bytes, merges: _core.Strings) -> None:
        """`types` are GGUF's, one for each token. Raises ValueError for a merge that names what is no token."""
        _core.check_merges(merges, tokens, types.translate(_IS_TOKEN))
        self._tokens, self._types, self._merges = tokens, types, merges
        self.added_tokens = {
            found.start(): AddedToken(tokens[found.start()], special=found[0] == _CONTROL, normalized=False)
            for found in _ADDED.finditer(types)
        }
        self._triples = _core.ByteTriples()  # of the texts so far
        self._part = self._for_texts()  # None: all of it is needed

    def encode(self, text: str, added: bool) -> list[int]:
        """Ids of `text`; with `added`, tokens of that kind are found in it."""
        if len(text) > LONG_TEXT:
            self._part = None
        if self._part is None:
            return self._whole.encode(text, added)
        found = self._part.encoding(text, added)
        if not self._triples.add("".join(found.tokens)):
            ids: list[int] = found.ids
            return ids
        self._part = self._for_texts()
        return (self._part or self._whole).encode(text, added)

    def _for_texts(self) -> Vocabulary | None:
        """The part that the texts so far can need, unless it is a large one."""
        merges = self._merges.covered(self._triples)
        if len(merges) * LARGE_SHARE > len(self._merges):
            return None
        tokens = (*self._tokens.covered(self._triples), *self.added_tokens)
        return self._library_of(tokens, [self._merges[i] for i in merges])

    @functools.cached_property
    def _whole(self) -> Vocabulary:
        with collector_paused():
            return self._library_of(range(len(self._tokens)), list(self._merges))

    def _library_of(self, tokens: Iterable[int], merges: Iterable[str]) -> Vocabulary:
        vocab = {self._tokens[i]: i for i in tokens if self._types[i] != UNUSED}
        backend = byte_level_bpe(vocab, split_merges(merges))
        backend.add_tokens(list(self.added_tokens.values()))
        return Vocabulary(backend)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """All of it."""
        return self._whole.backend

    def spelling(self, token: int) -> str | None:
        """None for an id that is no token."""
        known = 0 <= token < len(self._tokens) and self._types[token] != UNUSED
        return self._tokens[token] if known else None

    def token_id(self, spelling: str) -> int | None:
        """None for what is no token."""
        return next((i for i in reversed(self._tokens.places(spelling)) if self._types[i] != UNUSED), None)

    def tokens(self) -> list[str]:
        """Spellings in id order, as they are stored."""
        return list(self._tokens)

    def merges(self) -> list[tuple[str, str]]:
        """The merges in the order of their ranks."""
        return split_merges(self._merges)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Python looks for cycles after every few hundred tuples, and there are a hundred thousand without one."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
