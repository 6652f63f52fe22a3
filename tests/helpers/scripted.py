"""A model that says what a script holds; everything around it (template, cache, parser, terminal) is the real thing.

As a program: `python scripted.py ANSWERS LOG ARGUMENTS…` is `qwen-quant ARGUMENTS…` with such a model.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen_quant.cli import main
from qwen_quant.runtime.session import Session

ENDLESS = "…"  # an answer that begins with this goes on until somebody stops it


def scripted(answers: Sequence[str], contexts: Callable[[str], Any]) -> Callable[..., Iterator[int]]:
    """A stand-in for Session.generate that gives one of `answers` after the other, and tells `contexts` what the
    model has read by then."""
    left = iter(answers)

    def generate(
        session: Session,
        prompt_tokens: Sequence[int],
        max_tokens: int,
        sampling: object = None,
        stop_ids: Collection[int] = (),
    ) -> Iterator[int]:
        session.prefill(prompt_tokens)
        contexts(session.tokenizer.decode(session.tokens))
        answer = next(left)
        tokens = session.tokenizer.encode(answer, special=True)
        for token in tokens[:max_tokens]:
            yield token
            session.step(token)
        while answer.startswith(ENDLESS):
            time.sleep(0.02)
            yield tokens[-1]

    return generate


if __name__ == "__main__":
    answers, log, *arguments = sys.argv[1:]

    def keep(context: str) -> None:
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(json.dumps(context) + "\n")

    Session.generate = scripted(json.loads(answers), keep)  # type: ignore[method-assign]
    sys.exit(main(arguments))
