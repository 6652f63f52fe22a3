"""What is said to a model: a prompt, a conversation or tools, from the command line, a file or standard input."""

from __future__ import annotations

import json as jsonlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_quant.errors import QwenQuantError, UsageError

if TYPE_CHECKING:
    from qwen_quant.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """What is said to a model, and how.

    `prompt` is None for a conversation, given in `messages`; with no messages but the system's, the user is
    asked on the terminal.
    """

    prompt: str | None
    messages: list[Any]
    interactive: bool
    tools: list[Any] | None
    raw: bool
    thinking: bool | None
    json: bool

    def is_plain(self, tokenizer: Tokenizer) -> bool:
        """Whether the text goes to the model as it stands."""
        return self.raw or tokenizer.chat_template is None

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise UsageError for what cannot reach the model."""
        if self.is_plain(tokenizer):
            why = "--raw uses no chat template" if self.raw else "the file has no chat template"
            if self.prompt is None:
                raise UsageError(f"{why}; give the prompt with -p TEXT or -f FILE")
            if len(self.messages) > 1 or self.thinking is not None or self.tools is not None:
                raise UsageError(f"{why}; leave --system, --thinking and --tools out")
        elif self.tools and not re.search(r"\btools\b", tokenizer.chat_template or ""):
            raise UsageError("the file's chat template has no place for tools; leave --tools out")


def read_request(
    prompt: str | None,
    file: Path | None,
    messages: str | None,
    tools: Path | None,
    *,
    system: str | None,
    raw: bool,
    thinking: bool | None,
    json: bool,
) -> Request:
    """The command line with the files it names. Raises UsageError for options that contradict each other."""
    given = sum(source is not None for source in (prompt, file, messages))
    interactive = given == 0 and not raw and not json and sys.stdin.isatty()
    if given != 1 and not interactive:
        raise UsageError("give the prompt with -p TEXT or -f FILE or --messages FILE, one of them")
    if messages is not None and system is not None:
        raise UsageError("--messages has its own system message; leave --system out")
    conversation: list[Any] = [] if system is None else [{"role": "system", "content": system}]
    offered = None
    if messages is not None:
        conversation, offered = read_messages(messages)
    elif not interactive:
        prompt = read_text(str(file or prompt)) if prompt in (None, "-") else prompt
        conversation.append({"role": "user", "content": prompt})
    if tools is not None:
        offered = read_tools(tools)
    return Request(prompt, conversation, interactive, offered, raw, thinking, json)


def read_text(source: str) -> str:
    """The text in a file, or on standard input for '-'. Raises QwenQuantError naming a file it cannot read."""
    if source == "-":
        return sys.stdin.read()
    try:
        return Path(source).read_bytes().decode("utf-8")
    except OSError as error:
        raise QwenQuantError(f"{source}: cannot be read ({error.strerror}); name a text file") from None
    except UnicodeDecodeError as error:
        raise QwenQuantError(f"{source}: is not UTF-8 text (byte {error.start}); convert it first") from None


def read_messages(source: str) -> tuple[list[Any], list[Any] | None]:
    """Messages in OpenAI's chat format, and the tools that stand beside them in a request's body.

    Raises QwenQuantError naming the file when it is no JSON or holds something else.
    """
    from qwen_quant.chat_messages import check_tools, normalize

    found: Any = _read_json(source, "messages")
    tools: Any = None
    if isinstance(found, dict):
        found, tools = found.get("messages"), found.get("tools")
    try:
        normalize(found)
        check_tools(tools)
    except UsageError as error:
        raise QwenQuantError(f"{source}: {error}") from None
    return found, tools


def read_tools(path: Path) -> list[Any]:
    """A list of JSON schemas. Raises QwenQuantError naming the file when it holds something else."""
    from qwen_quant.chat_messages import check_tools

    found: Any = _read_json(str(path), "tools")
    if not isinstance(found, list):
        raise QwenQuantError(f"{path}: is no list of tools; put the schemas into [ … ]")
    try:
        check_tools(found)
    except UsageError as error:
        raise QwenQuantError(f"{path}: {error}") from None
    return found


def _read_json(source: str, what: str) -> Any:
    try:
        return jsonlib.loads(read_text(source))
    except (ValueError, RecursionError) as error:
        raise QwenQuantError(f"{source}: the {what} are no JSON ({error}); correct the file") from None
