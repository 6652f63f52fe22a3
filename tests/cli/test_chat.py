"""`qwen-quant run` as a chat on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import scripted as helper
from helpers.terminal import CTRL_C, CTRL_D, Terminal

from qwen_quant.cli.chat import Chat
from qwen_quant.runtime.conversation import Conversation
from qwen_quant.runtime.session import Session

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
OTHER_CALL = CALL.replace("Oslo", "Rome")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"


@pytest.fixture
def chat(gguf_file: Path, tmp_path: Path) -> Callable[..., Terminal]:
    """chat(answers, options…): a chat on a terminal, ready for its first line."""

    def start(answers: list[str], *options: object, model: Path = gguf_file) -> Terminal:
        script, log = json.dumps(answers), str(tmp_path / "contexts")
        arguments = ["run", model, *options]
        terminal = Terminal([sys.executable, helper.__file__, script, log, *map(str, arguments)])
        terminal.expect("/clear forgets")
        terminal.expect("> ")
        return terminal

    return start


@pytest.fixture
def contexts(tmp_path: Path) -> Callable[[], list[str]]:
    """What the model had read before each answer."""
    return lambda: [json.loads(line) for line in (tmp_path / "contexts").read_text().splitlines()]


def test_a_conversation_on_a_terminal(
    chat: Callable[..., Terminal], contexts: Callable[[], list[str]]
) -> None:
    terminal = chat(["One.", "Two.", "…", "Three.", "Four."], "--system", "Be brief.", "--no-think")
    terminal.enter("first")
    assert "One.\n" in terminal.expect("> ")
    terminal.press(CTRL_C)  # at the prompt it only tells how to leave
    assert "Ctrl-D ends the program" in terminal.expect("> ")
    terminal.enter("   ")
    terminal.expect("> ")
    terminal.enter("second")
    assert "Two.\n" in terminal.expect("> ")
    terminal.enter("endless")
    terminal.expect("…")
    terminal.press(CTRL_C)
    assert "[stopped]" in terminal.expect("> ")
    terminal.enter("third")
    assert "Three.\n" in terminal.expect("> ")
    terminal.enter("/clear")
    terminal.expect("> ")
    terminal.enter("again")
    assert "Four.\n" in terminal.expect("> ")
    terminal.press(CTRL_D)
    assert terminal.wait() == 0
    assert "Traceback" not in terminal.screen

    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    thought = "<think>\n\n</think>\n\n"
    first, second, endless, third, again = contexts()
    assert first == f"{system}{USER}first{END}{ASSISTANT}{thought}"
    assert second == f"{system}{USER}first{END}{ASSISTANT}One.{END}{USER}second{END}{ASSISTANT}{thought}"
    assert third.startswith(endless.removesuffix(thought) + "…") and f"{USER}third{END}" in third
    assert again == f"{system}{USER}again{END}{ASSISTANT}{thought}"


def test_tools_are_asked_of_the_user(
    chat: Callable[..., Terminal], contexts: Callable[[], list[str]], tool_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    answers = [f"<think>\nhm\n</think>\n\nLook:\n{CALL}\n{OTHER_CALL}", "Cold.", CALL, f"{CALL[:-14]}, oops"]
    terminal = chat(answers, "--tools", tmp_path / "tools.json", model=tool_file)
    terminal.enter("Is it cold?")
    shown = terminal.expect("weather> ")
    assert "<think>\nhm\n</think>\n\nLook:\n" in shown
    assert (
        '{"name": "weather", "arguments": {"city": "Oslo"}}\n{"name": "weather", "arguments": {"city"'
        in shown
    )
    terminal.enter("-5")
    terminal.expect("weather> ")
    terminal.enter("20 <|im_end|>")
    assert "Cold." in terminal.expect("\n> ")
    terminal.enter("And now?")
    terminal.expect("weather> ")
    terminal.enter("/clear")  # there too
    terminal.expect("\n> ")
    terminal.enter("Broken?")
    assert "a tool call cannot be read" in terminal.expect("\n> ")
    terminal.enter("/exit")
    assert terminal.wait() == 0

    first, responses, again, broken = contexts()
    assert first.startswith("<|im_start|>system\n" + json.dumps(TOOL))
    assert responses.endswith(
        f"Look:\n{CALL}\n{OTHER_CALL}{END}<|im_start|>tool\n-5{END}"
        f"<|im_start|>tool\n20 <|im_end|>{END}{ASSISTANT}"
    )
    assert again.endswith(f"{ASSISTANT}Cold.{END}{USER}And now?{END}{ASSISTANT}")
    assert broken.endswith(f"{USER}Broken?{END}{ASSISTANT}") and "Cold" not in broken


def test_an_error_ends_the_answer_not_the_chat(
    say: Callable[..., list[str]],
    gguf_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    lines = iter(["word " * 3000, "Hi"])

    def read(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("qwen_quant.cli.chat.prepare_terminal", lambda: None)
    contexts = say("Yes, I do.")
    Chat(Conversation(Session.open(gguf_file)), 2).run()
    shown = capsys.readouterr()
    assert "leaves no room in the context of 2048; start a new one or shorten it]" in shown.err
    assert contexts == [f"{USER}Hi{END}{ASSISTANT}"]
    assert "the answer is cut after 2 tokens; -n allows more" in shown.err
