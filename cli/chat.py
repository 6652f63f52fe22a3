"""A chat on a terminal: lines are read, answers stream, the history stays."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen_quant.cli.answers import note, report, show
from qwen_quant.errors import QwenQuantError

if TYPE_CHECKING:
    from qwen_quant.runtime.conversation import Conversation

HELP = "/clear forgets the conversation, /exit or Ctrl-D ends the program, Ctrl-C stops an answer"


class Ended(Exception):
    """The user wants to leave."""


class Chat:
    """Reads lines and answers them; what the conversation held at first survives /clear."""

    def __init__(self, conversation: Conversation, max_tokens: int | None) -> None:
        self._conversation = conversation
        self._beginning = list(conversation.messages)
        self._max_tokens = max_tokens

    def run(self) -> None:
        """Until the user leaves."""
        prepare_terminal()
        note(HELP)
        with contextlib.suppress(Ended):
            while True:
                messages = self._read()
                if messages is None:
                    self._conversation.messages = list(self._beginning)
                elif messages:
                    self._answer(messages)

    def _read(self) -> list[dict[str, Any]] | None:
        """What the user says: a message, or a response for each tool that was called; None for /clear."""
        history = self._conversation.messages
        calls = history[-1].get("tool_calls", ()) if history else ()
        if not calls:
            line = read_line("> ")
            return None if line is None else [{"role": "user", "content": line}] if line.strip() else []
        responses = []
        for call in calls:
            line = read_line(f"{call['function']['name']}> ")
            if line is None:
                return None
            responses.append({"role": "tool", "content": line})
        return responses

    def _answer(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Print the answer to `messages`; an error or Ctrl-C ends the answer, not the chat."""
        conversation = self._conversation
        try:
            with contextlib.closing(conversation.ask(messages, self._max_tokens)) as pieces:
                show(pieces)
        except KeyboardInterrupt:
            note("stopped")
            return
        except QwenQuantError as error:
            note(str(error))
            return
        completion = conversation.completion
        assert completion is not None
        for line in conversation.answer.errors:
            note(line)
        if completion.stop == "length":
            note(f"the answer is cut after {len(completion.tokens)} tokens; -n allows more")
        report(conversation.session, completion)


def prepare_terminal() -> None:
    """SIGTERM ends the program at once, as there is nothing to clean up; lines can be edited."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    reconfigure = getattr(sys.stdin, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() uses it once it is imported


def read_line(prompt: str) -> str | None:
    """One line, None for /clear. Raises Ended for /exit and at the end of input."""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            print()
            raise Ended from None
        except KeyboardInterrupt:
            print()
            note(HELP)
            continue
        if line.strip() == "/exit":
            raise Ended
        return None if line.strip() == "/clear" else line
