"""Answers are taken apart the same way however they arrive, and no answer raises an error."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_quant.chat_parsing import AnswerParser, Piece, ToolCall, parse_answer

CALL = '<tool_call>\n{"name": "get", "arguments": {"x": 1}}\n</tool_call>'
PARTS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", CALL, "<tool", "<", "\n", "\n\n", " ", '"', "a"),
    '{"name": "f", "arguments": {"t": "</tool_call>"}}',
    '{"name": "f"}',
    "{bad",
]
ANSWERS = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=ANSWERS, cuts=st.lists(st.integers(0, 200)), in_reasoning=st.booleans(), tools=st.booleans())
def test_cuts_change_nothing(text: str, cuts: list[int], in_reasoning: bool, tools: bool) -> None:
    parser = AnswerParser(in_reasoning=in_reasoning, tools=tools)
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces: list[Piece] = []
    for start, end in itertools.pairwise(ends):
        pieces += parser.push(text[start:end])
    pieces += parser.finish()
    whole = parse_answer(text, in_reasoning=in_reasoning, tools=tools)
    assert parser.answer == whole
    for field in ("content", "reasoning_content"):
        said = "".join(str(piece.value) for piece in pieces if piece.field == field)
        assert said == (getattr(whole, field) or "")
    assert [piece.value for piece in pieces if piece.field == "tool_calls"] == whole.tool_calls


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60), body=st.text(max_size=40))
def test_no_answer_raises(text: str, body: str) -> None:
    found = parse_answer(f"{text}<tool_call>{body}</tool_call>")
    assert found.errors or found.tool_calls or text.lstrip().startswith("<think>") or '"' in body


def test_reasoning_content_and_several_calls() -> None:
    found = parse_answer(f"<think>\nhm {CALL}\n</think>\n\nLet me see.\n{CALL}\n{CALL}")
    assert found.reasoning_content == f"hm {CALL}"
    assert found.content == "Let me see."
    assert found.tool_calls == [ToolCall("get", '{"x": 1}')] * 2
    function = {"name": "get", "arguments": '{"x": 1}'}
    assert found.as_message()["tool_calls"] == [{"type": "function", "function": function}] * 2


def test_the_closing_tag_inside_a_string_is_text() -> None:
    arguments = json.dumps({"text": 'say "</tool_call>"'})
    found = parse_answer(f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>')
    assert found.tool_calls == [ToolCall("f", arguments)]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("{bad", "Expecting"),
        ("[1]", "no JSON object"),
        ('{"arguments": {}}', 'no "name"'),
        ('{"name": "f", "arguments": [1]}', '"arguments" are no object'),
        ('{"name": "f", "arguments": {"x": NaN}}', "NaN"),
        ('{"name": "f", "arguments": ' + '{"a": ' * 100_000, "nested too deeply"),
    ],
)
def test_a_malformed_call_stays_in_the_content(body: str, error: str) -> None:
    text = f"See:\n<tool_call>\n{body}\n</tool_call>\nDone."
    found = parse_answer(text)
    assert (found.content, found.tool_calls) == (text, [])
    assert len(found.errors) == 1 and error in found.errors[0]


def test_an_answer_may_end_inside_a_call() -> None:
    assert parse_answer(CALL.removesuffix("\n</tool_call>")).tool_calls == [ToolCall("get", '{"x": 1}')]
    cut = parse_answer(CALL[:30])
    assert cut.content == CALL[:30]
    assert "not closed" in cut.errors[0]


def test_without_tools_a_call_is_text() -> None:
    assert parse_answer(CALL, tools=False).content == CALL
