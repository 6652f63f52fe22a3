"""Several answers to one prompt."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from qwen_quant.chat_parsing import Piece
from qwen_quant.cli import answers
from qwen_quant.runtime.samples import Sample, complete_samples

if TYPE_CHECKING:
    from qwen_quant.cli.prompts import Request
    from qwen_quant.runtime.sampling_params import SamplingParams
    from qwen_quant.runtime.session import Session


def complete_all(
    session: Session, request: Request, sampling: SamplingParams, max_tokens: int, count: int
) -> None:
    """Print `count` answers, one after the other when all are there."""
    complete = _go_on if request.is_plain(session.tokenizer) else _answer
    n_prompt, found = complete(session, request, sampling, max_tokens, count)
    if request.json:
        from qwen_quant.cli.output import print_json

        timings = session.timings
        print_json(
            {
                "samples": [fields for fields, _ in found],
                "prompt_tokens": n_prompt,
                "cached_tokens": n_prompt - timings.prompt_tokens,
                "pp_tok_s": timings.pp_tok_s,
                "tg_tok_s": timings.tg_tok_s,
            }
        )
        return
    for number, (_, pieces) in enumerate(found, start=1):
        sys.stdout.write(f"--- {number} of {count} ---\n")
        answers.show(pieces)


Found = tuple[
    int, list[tuple[dict[str, Any], list[Piece]]]
]  # tokens of the prompt; of each answer fields, pieces


def _go_on(
    session: Session, request: Request, sampling: SamplingParams, max_tokens: int, count: int
) -> Found:
    """What the prompt as it stands goes on with."""
    ids = session.tokenizer.encode(request.prompt or "", special=True)
    stop_ids = frozenset() if request.raw else session.eos_ids
    found = complete_samples(session, ids, count, max_tokens, sampling, stop_ids)
    return len(ids), [(_fields(sample), [Piece("content", sample.text)]) for sample in found]


def _answer(
    session: Session, request: Request, sampling: SamplingParams, max_tokens: int, count: int
) -> Found:
    """Answers to a conversation."""
    from qwen_quant.cli.run import conversation_of

    ids, found = conversation_of(session, request, sampling).samples(count, max_tokens)
    answered = []
    for sample, parser in found:
        pieces = [*parser.push(sample.text), *parser.finish()]
        parsed = {"message": parser.answer.as_message(), "errors": parser.answer.errors}
        answered.append((_fields(sample) | parsed, pieces))
    return len(ids), answered


def _fields(sample: Sample) -> dict[str, Any]:
    return {"text": sample.text, "tokens": sample.tokens, "stop": sample.stop}
