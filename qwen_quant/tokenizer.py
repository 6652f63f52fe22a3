"""Tokenizer: Qwen's byte-level BPE, from a checkpoint's folder or from the metadata of a GGUF file.

It needs only the `tokenizers` library, and jinja2 once a conversation is rendered. Added tokens (`<|im_end|>`,
`<think>`) are found in text only where the caller asks for it; text from a user never turns into one.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, normalizers, pre_tokenizers

from qwen_quant.byte_level import spelling_to_bytes
from qwen_quant.chat_messages import Messages, Tools, check_tools, normalize
from qwen_quant.errors import ConfigError, FormatError
from qwen_quant.tokenizer_files import SpecialTokens, read_folder, read_gguf
from qwen_quant.tokenizer_vocabulary import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    StoredVocabulary,
    Vocabulary,
    qwen2_pre_tokenizer,
)

# A base model's end of text and an instruct model's end of turn: both stop generation in every Qwen.
END_TOKENS = ("<|im_end|>", "<|endoftext|>")


class Tokenizer:
    """Text to ids and back. `where` names the file in errors."""

    def __init__(self, vocabulary: Vocabulary | StoredVocabulary, special: SpecialTokens, where: str) -> None:
        self._vocabulary = vocabulary
        self._special = special
        self._where = where
        self.added_tokens: Mapping[int, AddedToken] = vocabulary.added_tokens

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json` (or `vocab.json` and `merges.txt`) and what stands beside it in `folder`.

        Raises ConfigError naming the file that is missing, broken or not a byte-level BPE.
        """
        backend, special, where = read_folder(Path(folder))
        return cls(Vocabulary(backend), special, where)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: str = "GGUF metadata") -> Tokenizer:
        """Build from the keys `tokenizer.ggml.*`; raises FormatError naming a missing or foreign one."""
        return cls(*read_gguf(metadata, where), where)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`. With `special`, added tokens spelled in it become their ids, otherwise text."""
        # A lone surrogate (from a badly decoded file) has no UTF-8 form; it becomes U+FFFD.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._vocabulary.encode(text, special)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing."""
        return b"".join(self.token_bytes(i, skip_special=skip_special) for i in ids).decode(
            "utf-8", "replace"
        )

    def token_bytes(self, token: int, *, skip_special: bool = False) -> bytes:
        """The bytes `token` adds to a text; none for padding and, with `skip_special`, control tokens."""
        added = self.added_tokens.get(token)
        if added is not None:
            return b"" if skip_special and added.special else added.content.encode("utf-8")
        spelling = self._vocabulary.spelling(token)
        return b"" if spelling is None else spelling_to_bytes(spelling)

    def decoder(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self, skip_special)

    def token_id(self, spelling: str) -> int | None:
        """The id of a token by its spelling, or None."""
        return self._vocabulary.token_id(spelling)

    @functools.cached_property
    def tokens(self) -> list[str]:
        """Spellings in id order, byte-level ones as stored; an id nobody uses is `[PAD{id}]`."""
        return self._vocabulary.tokens()

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; a checkpoint's `vocab_size` may be larger (padding rows)."""
        return len(self.tokens)

    @functools.cached_property
    def merges(self) -> list[tuple[str, str]]:
        """The merges in the order of their ranks."""
        return self._vocabulary.merges()

    @functools.cached_property
    def token_types(self) -> list[int]:
        """GGUF's type of every token in id order: normal, control, user-defined or unused."""
        types = [NORMAL] * self.vocab_size
        for i, spelling in enumerate(self.tokens):
            if spelling == f"[PAD{i}]" and self._vocabulary.spelling(i) is None:
                types[i] = UNUSED
        for i, token in self.added_tokens.items():
            types[i] = _type_of_added(token)
        return types

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a turn, the checkpoint's own first."""
        ends = [self.token_id(spelling) for spelling in END_TOKENS]
        return tuple(dict.fromkeys([*self._special.eos_ids, *(i for i in ends if i is not None)]))

    @property
    def named_tokens(self) -> Mapping[str, str]:
        """The tokens a checkpoint gives a part: `eos_token`, `pad_token`, `bos_token`."""
        return self._special.named

    def pre_tokenizer_name(self) -> str:
        """llama.cpp's name of the pre-tokenizer; raises FormatError when it is not Qwen2's."""
        backend = self._vocabulary.backend
        if not _is_qwen2(backend.pre_tokenizer) or not isinstance(backend.normalizer, normalizers.NFC):
            raise FormatError(
                f"{self._where}: the text is normalized or cut into words in another way than Qwen2's; "
                "a GGUF reader would produce other ids, so it cannot be exported"
            )
        return "qwen2"

    def to_json(self) -> str:
        """The tokenizer as a tokenizer.json."""
        text: str = self._vocabulary.backend.to_str()
        return text

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's Jinja template, or None."""
        return self._special.chat_template

    def render_chat(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        tools: Tools | None = None,
    ) -> str:
        """The conversation as the model's text, for people to read; ids come from `apply_chat_template`."""
        check_tools(tools)
        variables = self._variables(normalize(messages), add_generation_prompt, enable_thinking, tools)
        from qwen_quant import chat

        return chat.render(self._template(), self._where, variables)

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        tools: Tools | None = None,
    ) -> list[int]:
        """Ids of a conversation, as transformers gives them when no message spells a token.

        Messages and tools are in OpenAI's chat format or Hugging Face's: the arguments of a tool call are an
        object or JSON text, which is printed as it is. Text of a message or a tool never becomes an added
        token, but an assistant's content keeps those that are not control tokens (`<think>`, `<tool_call>`),
        because the model had written them as such. Without a template of its own a model gets plain ChatML.
        Raises UsageError for malformed messages or tools, ConfigError when the template fails.
        """
        from qwen_quant import chat

        messages = normalize(messages)
        check_tools(tools)
        contents = [token.content for token in self.added_tokens.values()]
        outside = [*chat.strings_in(messages), *chat.strings_in(tools), self._template()]
        guard = chat.Guard.for_texts([c[0] for c in contents] + [c[-1] for c in contents], outside)
        hidden = [guard.hide_message(message, self._spoken_pattern) for message in messages]
        variables = self._variables(
            hidden, add_generation_prompt, enable_thinking, guard.hide_all(tools, None)
        )
        text = chat.render(self._template(), self._where, variables, guard)
        ids = {token.content.strip(): i for i, token in self.added_tokens.items()}
        return chat.encode_rendered(text, guard, self._token_pattern, ids.__getitem__, self.encode)

    def _template(self) -> str:
        template = self._special.chat_template
        if template is None and self.token_id("<|im_start|>") is None:
            raise ConfigError(f"{self._where}: has no chat_template and no <|im_start|> token; pass --raw")
        if template is not None:
            return template
        from qwen_quant.chat import CHATML

        return CHATML

    def _variables(
        self,
        messages: Messages,
        add_generation_prompt: bool,
        enable_thinking: bool | None,
        tools: Tools | None,
    ) -> dict[str, Any]:
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        common = {"messages": messages, "tools": tools, "documents": None}
        return {**self._special.named, **common, "add_generation_prompt": add_generation_prompt, **thinking}

    @functools.cached_property
    def _token_pattern(self) -> re.Pattern[str] | None:
        return _pattern_of(self.added_tokens.values())

    @functools.cached_property
    def _spoken_pattern(self) -> re.Pattern[str] | None:
        """Added tokens that a model writes in its answers and that carry no control."""
        return _pattern_of(t for t in self.added_tokens.values() if _type_of_added(t) == USER_DEFINED)


class StreamDecoder:
    """Decodes ids one at a time; half of a UTF-8 sequence waits for its other half."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that is complete after `token`, possibly none."""
        return self._utf8.decode(self._tokenizer.token_bytes(token, skip_special=self._skip_special))

    def finish(self) -> str:
        """What is left when no more ids come; an unfinished sequence becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


def _is_qwen2(pre_tokenizer: pre_tokenizers.PreTokenizer | None) -> bool:
    def parts(state: bytes) -> list[tuple[Any, ...]]:
        # trim_offsets concerns offsets only; the rest decides the ids.
        keys = ("type", "pattern", "behavior", "invert", "add_prefix_space", "use_regex")
        return [tuple(str(step.get(k)) for k in keys) for step in json.loads(state).get("pretokenizers", [])]

    return pre_tokenizer is not None and parts(pre_tokenizer.__getstate__()) == parts(
        qwen2_pre_tokenizer().__getstate__()
    )


def _type_of_added(token: AddedToken) -> int:
    # llama.cpp's readers take <|…|> as control whatever its flag says; say so in the file.
    return CONTROL if token.special or re.fullmatch(r"<\|.*\|>", token.content) else USER_DEFINED


def _pattern_of(tokens: Iterable[AddedToken]) -> re.Pattern[str] | None:
    """A pattern finding any of `tokens`, the longest first, with the spaces that some swallow."""
    ordered = sorted(tokens, key=lambda t: -len(t.content))
    parts = [r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in ordered]
    return re.compile("|".join(parts)) if parts else None
