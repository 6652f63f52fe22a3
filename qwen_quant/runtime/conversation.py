"""A conversation of several turns with a Session: only what is new is read, and answers come taken apart."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from qwen_quant.chat_parsing import THINK, AnswerParser, ParsedAnswer, Piece
from qwen_quant.errors import QwenQuantError
from qwen_quant.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from qwen_quant.runtime.samples import Sample
    from qwen_quant.runtime.session import Session


class Completion:
    """Text that a session generates after a prompt, piece by piece as it is iterated over.

    `max_tokens` None goes on until the context is full. Afterwards `tokens` and `text` hold the whole, and
    `stop` why it ended: `end_of_turn`, `length` (max_tokens reached), `context` (it is full), or
    `interrupted`, when the caller or Ctrl-C broke it off.
    """

    def __init__(
        self,
        session: Session,
        prompt_tokens: Sequence[int],
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop_ids: Collection[int] = (),
    ) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.stop = "interrupted"
        self.prompt_tokens = prompt_tokens
        self._session = session
        self._max_tokens = max_tokens
        self._sampling = sampling
        self._stop_ids = stop_ids

    def __iter__(self) -> Iterator[str]:
        """Raises as Session.generate does."""
        session = self._session
        prompt = session.keep_shared(self.prompt_tokens)
        room = max(session.n_ctx - len(self.prompt_tokens), 0)
        limit = room if self._max_tokens is None else min(self._max_tokens, room)
        decoder = session.tokenizer.decoder(skip_special=True)
        with closing(session.generate(prompt, limit, self._sampling, self._stop_ids)) as tokens:
            for token in tokens:
                self.tokens.append(token)
                yield self._add(decoder.push(token))
        yield self._add(decoder.finish())
        if len(self.tokens) < limit:
            self.stop = "end_of_turn"
        else:
            self.stop = "length" if limit < room else "context"

    def _add(self, text: str) -> str:
        self.text += text
        return text


class Conversation:
    """Messages so far, in OpenAI's chat format, and the session that answers them.

    `tools` are JSON schemas; without them a call is text like any other. `thinking` switches `<think>` in
    templates that know it.
    """

    def __init__(
        self,
        session: Session,
        messages: Sequence[Mapping[str, Any]] = (),
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        sampling: SamplingParams | None = None,
    ) -> None:
        self.session = session
        self.messages: list[Mapping[str, Any]] = list(messages)
        self.tools = tools or None
        self.thinking = thinking
        self.sampling = sampling
        self.completion: Completion | None = None  # the last answer as it was generated
        self.answer = ParsedAnswer()  # and taken apart

    def ask(
        self, new_messages: Sequence[Mapping[str, Any]] = (), max_tokens: int | None = None
    ) -> Generator[Piece, None, None]:
        """Adds `new_messages`, yields the answer's pieces, and adds it when it ends or the caller breaks off.

        When that happens before the first token, the messages are as they were. Raises QwenQuantError when they do not
        fit into the context, ConfigError and UsageError as Tokenizer.apply_chat_template does.
        """
        n_messages = len(self.messages)
        self.messages += new_messages
        self.completion = None
        try:
            yield from self._answer(self._ids(), max_tokens)
        finally:
            made = self.completion
            if made is not None and (made.tokens or made.stop != "interrupted"):
                self.messages.append(self.answer.as_message())
            else:
                del self.messages[n_messages:]

    def samples(self, count: int, max_tokens: int) -> tuple[list[int], list[tuple[Sample, AnswerParser]]]:
        """The prompt's ids, and `count` answers to the messages so far, each with the parser that is to read it;
        none of them is added. Raises as `ask` and `complete_samples` do."""
        from qwen_quant.runtime.samples import complete_samples

        ids = self._ids()
        parsers = [self._parser(ids) for _ in range(count)]
        answers = complete_samples(self.session, ids, count, max_tokens, self.sampling, self.session.eos_ids)
        return ids, list(zip(answers, parsers, strict=True))

    def _ids(self) -> list[int]:
        return self.session.tokenizer.apply_chat_template(
            self.messages, enable_thinking=self.thinking, tools=self.tools
        )

    def _parser(self, ids: Sequence[int]) -> AnswerParser:
        """For an answer to a prompt, which has to leave room for it."""
        session = self.session
        if len(ids) >= session.n_ctx:
            raise QwenQuantError(
                f"{session.file.path}: the conversation has {len(ids)} tokens and leaves no room in the context "
                f"of {session.n_ctx}; start a new one or shorten it"
            )
        return AnswerParser(in_reasoning=self._opens_thinking(ids), tools=self.tools is not None)

    def _answer(self, ids: list[int], max_tokens: int | None) -> Iterator[Piece]:
        session = self.session
        parser = self._parser(ids)
        self.answer = parser.answer
        self.completion = Completion(session, ids, max_tokens, self.sampling, session.eos_ids)
        try:
            for text in self.completion:
                yield from parser.push(text)
        except GeneratorExit:
            parser.finish()
            raise
        except KeyboardInterrupt:
            yield from parser.finish()
            raise
        yield from parser.finish()

    def _opens_thinking(self, ids: Sequence[int]) -> bool:
        """Whether the template itself wrote `<think>` at the end of the prompt."""
        return self.session.tokenizer.decode(ids[-8:]).rstrip().endswith(THINK)
