"""Rendering a chat template without letting anybody's text become a control token.

A template prints special tokens as ordinary text (`<|im_start|>`), and so can a user. To tell them apart
after rendering, the characters that may begin or end a token are exchanged for unused private ones in every
string that came from outside, the template is rendered, tokens are cut out of the result, and only then are
the characters exchanged back. Nothing outside the template can complete a token, wherever its text lands.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_quant.chat_messages import Arguments, json_text
from qwen_quant.errors import ConfigError

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# Templates compare roles with these, so they stay readable; any other comes from outside like a content.
ROLES = frozenset({"system", "user", "assistant", "tool"})
# Of Qwen (1)'s chat models, whose code puts a system message first when there is none.
CHATML_WITH_SYSTEM = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}" + CHATML
)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what an assistant wrote; it prints its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads this class attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class Guard:
    """The exchange of token-forming characters; `swap` maps each to its private stand-in."""

    swap: Mapping[str, str]

    @classmethod
    def for_texts(cls, edges: Iterable[str], texts: Iterable[str]) -> Guard:
        """Choose stand-ins for `edges` from Unicode's private plane that occur in none of `texts`."""
        used = set().union(*map(set, texts))
        free = (chr(c) for c in range(0x10FFFD, 0x100000, -1) if chr(c) not in used)
        return cls({edge: next(free) for edge in sorted(set(edges))})

    def hide(self, text: str, keep: re.Pattern[str] | None) -> str:
        """Exchange the characters everywhere in `text` except inside matches of `keep`."""
        table = {ord(edge): private for edge, private in self.swap.items()}
        if keep is None:
            return text.translate(table)
        parts: list[str] = []
        last = 0
        for match in keep.finditer(text):
            parts += [text[last : match.start()].translate(table), match.group()]
            last = match.end()
        return "".join(parts) + text[last:].translate(table)

    def reveal(self, text: str) -> str:
        """Undo `hide`."""
        return text.translate({ord(private): edge for edge, private in self.swap.items()})

    def hide_all(self, value: Any, keep: re.Pattern[str] | None) -> Any:
        """`hide` every string inside nested lists and objects, keys included."""
        if isinstance(value, str):
            return self.hide(value, keep)
        if isinstance(value, Arguments):
            return Arguments(self.hide_all(dict(value), keep), self.hide(json_text(value), keep))
        if isinstance(value, Mapping):
            return {self.hide_all(k, keep): self.hide_all(v, keep) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide_all(item, keep) for item in value]
        return value

    def hide_message(self, message: Mapping[str, Any], spoken: re.Pattern[str] | None) -> dict[str, Any]:
        """`message` hidden but for the tokens `spoken` that an assistant writes in its content.

        Where a template prints such tokens itself, around reasoning and tool calls, there are none to keep.
        """
        if message["role"] not in ROLES:
            return dict(self.hide_all(message, None))
        hidden = {self.hide(key, None): self.hide_all(value, None) for key, value in message.items()}
        hidden["role"] = message["role"]
        if message["role"] == "assistant":
            hidden["content"] = self.hide_all(message["content"], spoken)
        return hidden


def strings_in(value: Any) -> Iterator[str]:
    """Every string inside nested lists and objects, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings_in(item)


def render(template: str, where: str, variables: Mapping[str, Any], guard: Guard | None = None) -> str:
    """Render `template` in the environment transformers uses: sandboxed, blocks trimmed, its four helpers.

    Raises ConfigError naming `where` when the template does not compile or refuses the conversation.
    """
    try:
        return _compile(template, guard.swap.values() if guard else ()).render(**variables)
    except (
        Exception
    ) as error:  # a template is a program of somebody else's: it may fail in every way there is
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{where}: the chat template fails ({reason}); check the messages or the template"
        ) from None


def _compile(template: str, private: Iterable[str]) -> jinja2.Template:
    return _compile_cached(template, tuple(private))


@functools.lru_cache(maxsize=8)
def _compile_cached(template: str, private: tuple[str, ...]) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = functools.partial(_to_json, private)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(
    private: Sequence[str],
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML characters, which models were not trained on."""
    if isinstance(value, Arguments) and not (ensure_ascii or indent or separators or sort_keys):
        return json_text(value)
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if ensure_ascii:
        for character in private:
            text = text.replace(json.dumps(character)[1:-1], character)
    return text


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def encode_rendered(
    text: str,
    guard: Guard,
    tokens: re.Pattern[str] | None,
    token_id: Callable[[str], int],
    encode_plain: Callable[[str], list[int]],
) -> list[int]:
    """Cut the template's own tokens out of `text`, reveal the rest and encode it as plain text."""
    ids: list[int] = []
    last = 0
    for match in tokens.finditer(text) if tokens else ():
        ids += encode_plain(guard.reveal(text[last : match.start()]))
        ids.append(token_id(match.group().strip()))
        last = match.end()
    return ids + encode_plain(guard.reveal(text[last:]))
