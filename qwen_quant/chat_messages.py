"""Messages as callers give them, made into what chat templates read.

Callers follow OpenAI's chat format or Hugging Face's; templates are written for the latter. The two differ in
null fields, in content split into parts, and in the arguments of a tool call: OpenAI's are JSON as a string.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_quant.errors import UsageError

Message = Mapping[str, Any]
Messages = Sequence[Message]
Tools = Sequence[Mapping[str, Any]]

# Names that reasoning goes by; templates read the first.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


class Arguments(dict[str, Any]):
    """The arguments of a tool call that came as JSON text: an object to a template that looks inside.

    `tojson` prints the text itself, so that a call the model wrote is read back token by token.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        super().__init__(values)
        self._source = source  # the sandbox refuses names with an underscore: no key is shadowed


def json_text(arguments: Arguments) -> str:
    """The JSON that `arguments` came as."""
    return arguments._source


def normalize(messages: Messages) -> list[dict[str, Any]]:
    """Copies of `messages` without null fields, with text as content and arguments as objects.

    Raises UsageError naming the message that has no role, content other than text, or a nameless tool call.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UsageError('messages: empty or not a list; give objects like {"role": "user", "content": "…"}')
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def check_tools(tools: Tools | None) -> None:
    """Raise UsageError unless `tools` is None or a list of named JSON schemas."""
    if tools is None:
        return
    if not isinstance(tools, (list, tuple)):
        raise UsageError(
            'tools: not a list; give schemas like [{"type": "function", "function": {"name": "…"}}]'
        )
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UsageError(
                f'tools[{index}]: has no name; give {{"type": "function", "function": {{"name": "…"}}}}'
            )


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UsageError(f"{where}: has no role; give {{'role': 'user', 'content': '…'}}")
    found = {key: value for key, value in message.items() if value is not None}
    if isinstance(found.get("content"), (list, tuple)):
        found["content"] = _text_of_parts(found["content"], where)
    # What a tool returns may be an object: templates print it.
    if not isinstance(found.get("content", ""), str) and message["role"] != "tool":
        raise UsageError(f"{where}: content is {reprlib.repr(found['content'])}; give text")
    if message["role"] != "assistant":
        return found
    # An answer that only calls tools has null content in OpenAI's format; Qwen's templates add it as text.
    found.setdefault("content", "")
    reasoning = next((found[key] for key in REASONING_KEYS if key in found), None)
    if reasoning is not None:
        found["reasoning_content"] = reasoning
    if "tool_calls" in found:
        found["tool_calls"] = _tool_calls(found["tool_calls"], where)
    return found


def _text_of_parts(parts: Sequence[Any], where: str) -> str:
    texts = []
    for part in parts:
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UsageError(f"{where}: a content part of type {kind!r}; these models read text only")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)):
        raise UsageError(f"{where}: tool_calls is no list; give [{{'function': {{'name': …}}}}]")
    found = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UsageError(f"{where}: tool_calls[{index}] has no name; give {{'function': {{'name': …}}}}")
        function = {**function, "arguments": _arguments(function.get("arguments"))}
        found.append({**call, "function": function} if "function" in call else function)
    return found


def _arguments(value: Any) -> Any:
    """`value` as an object where it is the JSON of one; other text stays as it is."""
    if value is None or value == "":
        return {}
    if not isinstance(value, str):
        return value
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return Arguments(decoded, value) if isinstance(decoded, dict) else value
