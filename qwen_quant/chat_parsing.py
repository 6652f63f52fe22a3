"""Reading a model's answer: its reasoning, its text, and the tools it calls.

The format is Qwen's own: `<think>` … `</think>` first, then text, then calls after Nous Research's Hermes,
`<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>`. Fields are named as in OpenAI's chat format.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """A function that the model asks for; `arguments` is a JSON object as text, as the model wrote it."""

    name: str
    arguments: str

    def as_message_field(self) -> dict[str, Any]:
        """An entry of `tool_calls` in a message."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text to append to `reasoning_content` or `content`, or one of `tool_calls`."""

    field: str
    value: str | ToolCall


@dataclass
class ParsedAnswer:
    """An answer taken apart.

    `reasoning_content` is None where the model did not think. `errors` has a line for each tool call that
    could not be read; its text stands in `content`, tags and all.
    """

    content: str = ""
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def as_message(self) -> dict[str, Any]:
        """The assistant's message for the next turn; `reasoning_content` and `tool_calls` where there are."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.as_message_field() for call in self.tool_calls]
        return message


class _State(Enum):
    START = auto()  # nothing but white space so far
    OPENED = auto()  # after <think>, before the first character of reasoning
    REASONING = auto()
    CLOSED = auto()  # after </think>, before the first character that follows
    CONTENT = auto()
    CALL = auto()
    CALLED = auto()  # after a call, before the first character that follows


class AnswerParser:
    """Takes an answer as it is generated, in pieces of any size; however it is cut, the outcome is the same.

    `in_reasoning` says that the prompt ended inside `<think>`; without `tools` a call is text like any other.
    Nothing that a model can write raises an error.
    """

    def __init__(self, *, in_reasoning: bool = False, tools: bool = True) -> None:
        self.answer = ParsedAnswer(reasoning_content="" if in_reasoning else None)
        self._tools = tools
        self._state = _State.OPENED if in_reasoning else _State.START
        self._text = ""  # not yet decided upon
        self._searched = 0  # how much of it cannot hold the tag that ends a call
        self._before_call = ""  # the newline that was taken for the template's
        self._pieces: list[Piece] = []

    def push(self, text: str) -> list[Piece]:
        """What is certain after `text`."""
        self._text += text
        while self._step(final=False):
            pass
        return self._take()

    def finish(self) -> list[Piece]:
        """What is left when the answer ends here. A complete call without its closing tag counts."""
        while self._step(final=True):
            pass
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _step(self, final: bool) -> bool:
        """Advance by one state; False when that needs more text."""
        if self._state is _State.START:
            return self._start(final)
        if self._state in (_State.OPENED, _State.CLOSED):
            return self._skip_newlines()
        if self._state is _State.REASONING:
            return self._reason(final)
        if self._state is _State.CONTENT:
            return self._content(final)
        if self._state is _State.CALL:
            return self._call(final)
        return self._called(final)

    def _start(self, final: bool) -> bool:
        """An answer thinks if `<think>` is the first thing in it."""
        text = self._text.lstrip()
        if text.startswith(THINK):
            self.answer.reasoning_content = ""
            return self._enter(_State.OPENED, text[len(THINK) :])
        if THINK.startswith(text) and not final:
            return False
        return bool(self._text) and self._enter(_State.CONTENT, self._text)

    def _skip_newlines(self) -> bool:
        self._text = self._text.lstrip("\n")
        if not self._text:
            return False
        return self._enter(_State.REASONING if self._state is _State.OPENED else _State.CONTENT, self._text)

    def _reason(self, final: bool) -> bool:
        """Newlines before `</think>` belong to the template."""
        text, tag, rest = self._text.partition(END_THINK)
        if tag:
            self._emit("reasoning_content", text.rstrip("\n"))
            return self._enter(_State.CLOSED, rest)
        held = 0 if final else _length_of_start(text, END_THINK)
        kept = len(text[: len(text) - held].rstrip("\n"))
        self._emit("reasoning_content", text[:kept])
        self._text = "" if final else text[kept:]
        return False

    def _content(self, final: bool) -> bool:
        """One newline before `<tool_call>` belongs to the template."""
        text, tag, rest = self._text.partition(CALL) if self._tools else (self._text, "", "")
        if tag:
            self._before_call = "\n" if text.endswith("\n") else ""
            self._emit("content", text.removesuffix("\n"))
            return self._enter(_State.CALL, rest)
        held = 0 if final or not self._tools else _length_of_start(text, CALL)
        kept = len(text) - held
        if self._tools and not final and text[:kept].endswith("\n"):
            kept -= 1
        self._emit("content", text[:kept])
        self._text = text[kept:]
        return False

    def _call(self, final: bool) -> bool:
        """A closing tag inside a JSON string is text of that string."""
        end = self._text.find(END_CALL, self._searched)
        if end >= 0 and not _inside_string(self._text[:end]):
            return self._end_call(self._text[:end], self._text[: end + len(END_CALL)])
        self._searched = end + 1 if end >= 0 else max(0, len(self._text) - len(END_CALL) + 1)
        if end < 0 and final:
            return self._end_call(self._text, self._text)
        return end >= 0

    def _end_call(self, body: str, written: str) -> bool:
        """Take the call, or put what was `written` back into the content to the letter."""
        rest = self._text[len(written) :]
        try:
            call = parse_call(body)
        except ValueError as error:
            unfinished = "" if body != written else ", and it is not closed"
            self.answer.errors.append(f"a tool call cannot be read ({error}{unfinished})")
            self._emit("content", self._before_call + CALL + written)
            return self._enter(_State.CONTENT, rest)
        self.answer.tool_calls.append(call)
        self._pieces.append(Piece("tool_calls", call))
        return self._enter(_State.CALLED, rest)

    def _called(self, final: bool) -> bool:
        """White space after a call separates it from the next; other text continues the content."""
        separator = "\n" if self.answer.content else ""
        text = self._text.lstrip()
        if text.startswith(CALL):
            self._before_call = separator
            return self._enter(_State.CALL, text[len(CALL) :])
        if CALL.startswith(text) and not (final and text):
            return False
        self._emit("content", separator + text[0])
        return self._enter(_State.CONTENT, text[1:])

    def _enter(self, state: _State, text: str) -> bool:
        self._state, self._text, self._searched = state, text, 0
        return True

    def _emit(self, name: str, text: str) -> None:
        if text:
            setattr(self.answer, name, (getattr(self.answer, name) or "") + text)
            self._pieces.append(Piece(name, text))


def parse_answer(text: str, *, in_reasoning: bool = False, tools: bool = True) -> ParsedAnswer:
    """A whole answer taken apart; the options are AnswerParser's."""
    parser = AnswerParser(in_reasoning=in_reasoning, tools=tools)
    parser.push(text)
    parser.finish()
    return parser.answer


def parse_call(body: str) -> ToolCall:
    """The call that stands between the tags. Raises ValueError saying what is wrong with it."""
    try:
        members = _members(body.strip())
        name, arguments = json.loads(members.get("name", "null")), members.get("arguments", "{}")
        decoded = json.loads(arguments)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(name, str) or not name:
        raise ValueError('it has no "name"')
    if not isinstance(decoded, dict):
        raise ValueError('its "arguments" are no object')
    return ToolCall(name, arguments)


_SPACE = re.compile(r"[ \t\r\n]*")


def _members(text: str) -> dict[str, str]:
    """The values of a JSON object by key, each as its own text."""
    found: dict[str, str] = {}
    if not isinstance(_loads(text), dict):
        raise ValueError("it is no JSON object")
    decoder = json.JSONDecoder()
    at = _after_space(text, 1)
    while text[at] != "}":
        key, at = decoder.raw_decode(text, at)
        start = _after_space(text, _after_space(text, at) + 1)  # beyond the colon
        _, at = decoder.raw_decode(text, start)
        found[key] = text[start:at]
        at = _after_space(text, at)
        if text[at] == ",":
            at = _after_space(text, at + 1)
    return found


def _loads(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def _after_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at


def _inside_string(text: str) -> bool:
    """Whether JSON that begins with `text` goes on inside a string; no string reaches over a line's end."""
    line = text[text.rfind("\n") + 1 :]
    return re.sub(r"\\.", "", line).count('"') % 2 == 1


def _length_of_start(text: str, tag: str) -> int:
    """Length of the longest end of `text` with which `tag` could begin."""
    lengths = range(min(len(tag) - 1, len(text)), 0, -1)
    return next((length for length in lengths if tag.startswith(text[-length:])), 0)
