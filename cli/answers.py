"""Showing an answer as it is generated."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_quant.chat_parsing import Piece
    from qwen_quant.runtime.conversation import Completion
    from qwen_quant.runtime.session import Session


class Printer:
    """Writes to standard output what comes, at once; every answer ends with its own line."""

    def __init__(self) -> None:
        self._last = ""  # what was written last
        self._thinking = False

    def text(self, text: str) -> None:
        """Write `text` as it is."""
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._last = text

    def piece(self, piece: Piece) -> None:
        """Write a part of an answer: reasoning between its tags, a tool call as JSON on a line."""
        self._think(piece.field == "reasoning_content")
        if isinstance(piece.value, str):
            self.text(piece.value)
        else:
            self._new_line()
            call = {"name": piece.value.name, "arguments": jsonlib.loads(piece.value.arguments)}
            self.text(jsonlib.dumps(call, ensure_ascii=False) + "\n")

    def finish(self) -> None:
        """End the line, unless nothing was written."""
        self._new_line()

    def _think(self, thinking: bool) -> None:
        if thinking != self._thinking:
            self.text("<think>\n" if thinking else "\n</think>\n\n")
        self._thinking = thinking

    def _new_line(self) -> None:
        if self._last and not self._last.endswith("\n"):
            self.text("\n")


def show(pieces: Iterable[Piece]) -> None:
    """Print an answer while it comes; its last line ends, whatever happens."""
    printer = Printer()
    try:
        for piece in pieces:
            printer.piece(piece)
    finally:
        printer.finish()


def output(pieces: Iterable[Piece], json: bool) -> None:
    """Let an answer come: to the screen, or with `json` silently."""
    if json:
        for _ in pieces:
            pass
    else:
        show(pieces)


def note(text: str) -> None:
    """A remark that is not part of the answer, on standard error."""
    print(f"[{text}]", file=sys.stderr, flush=True)


def report(
    session: Session,
    completion: Completion,
    *,
    json: bool = False,
    parsed: Mapping[str, Any] | None = None,
) -> None:
    """What there is to say after an answer; as `json` all of it, with `parsed` for the answer taken apart."""
    if completion.stop == "context":
        note(f"the answer is cut: the context of {session.n_ctx} tokens is full")
    timings = session.timings
    guesses = {"drafted": timings.drafted, "accepted": timings.accepted} if session.draft_max else {}
    n_prompt = len(completion.prompt_tokens)
    if json:
        from qwen_quant.cli.output import print_json

        print_json(
            {
                "text": completion.text,
                "tokens": completion.tokens,
                "prompt_tokens": n_prompt,
                "cached_tokens": n_prompt - timings.prompt_tokens,
                "pp_tok_s": timings.pp_tok_s,
                "tg_tok_s": timings.tg_tok_s,
                "stop": completion.stop,
                **guesses,
                **(parsed or {}),
            }
        )
    elif sys.stderr.isatty():
        speed = f"{timings.prompt_tokens} prompt tokens, {timings.pp_tok_s:.1f} tok/s"
        right = f"; {timings.accepted} of {timings.drafted} guesses right" if guesses else ""
        note(f"{speed}; {len(completion.tokens)} generated, {timings.tg_tok_s:.1f} tok/s{right}")
