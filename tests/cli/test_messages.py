"""`qwen-quant run` with conversations and tools from files, and its answers taken apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_quant.tokenizer import Tokenizer

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
USER, END = "<|im_start|>user\n", "<|im_end|>\n"


def test_json_holds_the_answer_taken_apart(
    cli: Callable, say: Callable[..., list[str]], tool_file: Path, tmp_path: Path
) -> None:
    conversation = [
        {"role": "system", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "Is it"}, {"type": "text", "text": "cold?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city":  "Oslo"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "-5"},
    ]
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"model": "any", "messages": conversation[1:], "tools": [TOOL]}))
    contexts = say(f"<think>\nhm\n</think>\n\nSo:\n{CALL}\n<tool_call>\n{{bad\n</tool_call>")
    found = cli("run", tool_file, "--messages", path, "--json").json
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert found["message"] == {
        "role": "assistant",
        "content": "So:\n<tool_call>\n{bad\n</tool_call>",
        "reasoning_content": "hm",
        "tool_calls": [{"type": "function", "function": function}],
    }
    assert len(found["errors"]) == 1 and found["errors"][0].startswith("a tool call cannot be read")
    assert found["stop"] == "end_of_turn"
    assert '{"name": "weather", "arguments": {"city":  "Oslo"}}' in contexts[0]  # as the model had written it
    assert f"{USER}Is it\ncold?{END}" in contexts[0]


def test_messages_and_tools_from_files_and_stdin(
    cli: Callable,
    say: Callable[..., list[str]],
    process: Callable,
    tool_file: Path,
    tmp_path: Path,
) -> None:
    messages, tools = tmp_path / "messages.json", tmp_path / "tools.json"
    messages.write_text(json.dumps([{"role": "user", "content": "Hi"}]))
    tools.write_text(json.dumps([TOOL["function"]]))
    contexts = say("Yes.", "Yes.")
    done = cli("run", tool_file, "--messages", messages, "--tools", tools)
    assert (done.code, done.out, done.err) == (0, "Yes.\n", "")
    assert cli("run", tool_file, "-p", "Hi", "--tools", tools).out == "Yes.\n"
    assert contexts[0] == contexts[1] and json.dumps(TOOL["function"]) in contexts[0]
    arguments = ["run", tool_file, "--messages", "-", "-n", "2", "--json"]
    piped = process(*arguments, stdin=messages.read_text()).json
    ids = Tokenizer.from_folder(tool_file.parent).apply_chat_template(json.loads(messages.read_text()))
    assert piped["prompt_tokens"] == len(ids)


@pytest.mark.parametrize(
    ("options", "thinks"),
    [
        ([], None),
        (["--think"], True),
        (["--no-think"], False),
        (["--thinking"], True),
        (["--no-thinking"], False),
    ],
)
def test_thinking_reaches_the_template(
    cli: Callable, say: Callable[..., list[str]], gguf_file: Path, options: list[str], thinks: bool | None
) -> None:
    contexts = say("Yes.")
    assert cli("run", gguf_file, "-p", "Hi", *options).code == 0
    assert contexts[0].endswith("</think>\n\n") == (thinks is False)


BAD_MESSAGES: list[tuple[Any, str]] = [
    ("", "the messages are no JSON"),
    ("{", "the messages are no JSON"),
    ("[" * 100_000, "the messages are no JSON"),
    ("null", "messages: empty or not a list"),
    ("[]", "messages: empty or not a list"),
    ("{}", "messages: empty or not a list"),
    ([1], "messages[0]: has no role"),
    ([{"content": "x"}], "messages[0]: has no role"),
    ([{"role": 3}], "messages[0]: has no role"),
    (
        [{"role": "user", "content": [{"type": "image_url"}]}],
        "messages[0]: a content part of type 'image_url'",
    ),
    ([{"role": "user", "content": 5}], "messages[0]: content is 5"),
    ([{"role": "system", "content": {"a": 1}}], "messages[0]: content is {'a': 1}"),
    ([{"role": "assistant", "tool_calls": 3}], "messages[0]: tool_calls is no list"),
    ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "messages[0]: tool_calls[0] has no name"),
    ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools[0]: has no name"),
    ({"messages": [{"role": "user", "content": "x"}], "tools": 3}, "tools: not a list"),
]


@pytest.mark.parametrize(("content", "problem"), BAD_MESSAGES)
def test_bad_messages_are_one_line(
    cli: Callable, gguf_file: Path, tmp_path: Path, content: Any, problem: str
) -> None:
    path = tmp_path / "messages.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    done = cli("run", gguf_file, "--messages", path)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"qwen-quant: {path}: {problem}") and done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "the tools are no JSON"),
        (b"{}", "is no list of tools"),
        (b"[3]", "tools[0]: has no name"),
        (b"\xff", "is not UTF-8 text (byte 0)"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_bad_tools_are_one_line(
    cli: Callable, tool_file: Path, tmp_path: Path, content: bytes | None, problem: str
) -> None:
    path = tmp_path / "tools.json"
    if content is not None:
        path.write_bytes(content)
    done = cli("run", tool_file, "-p", "Hi", "--tools", path)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"qwen-quant: {path}: {problem}") and done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--messages", "{messages}", "--system", "x"], "--messages has its own system message"),
        (["--messages", "{messages}", "-p", "x"], "one of them"),
        (["--messages", "{messages}", "--raw"], "--raw uses no chat template"),
        (["-p", "x", "--raw", "--think"], "--raw uses no chat template"),
        (["-p", "x", "--raw", "--tools", "{tools}"], "--raw uses no chat template"),
        (["-p", "x", "--tools", "{tools}"], "has no place for tools"),
        (["--json"], "give the prompt with -p TEXT"),
    ],
)
def test_options_that_exclude_each_other(
    cli: Callable, gguf_file: Path, tmp_path: Path, options: list[str], problem: str
) -> None:
    (tmp_path / "messages.json").write_text('[{"role": "user", "content": "x"}]')
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    names = {name: tmp_path / f"{name}.json" for name in ("messages", "tools")}
    done = cli("run", gguf_file, *(option.format(**names) for option in options))
    assert (done.code, done.out) == (2, "")
    assert problem in done.err and done.err.count("\n") == 1
