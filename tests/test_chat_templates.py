"""Templates render to transformers' token ids, whatever of Jinja they use; one that fails is one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_quant.errors import ConfigError
from qwen_quant.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[1]
SHARED = Path(os.environ.get("QWEN_QUANT_SHARED", REPOSITORY.parent / "shared")) / "tokenizers"

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "  Das Wetter für 'Ort' & \"Tag\" <b>  ",
            "parameters": {
                "type": "object",
                "properties": {"ort": {"type": "string", "enum": ["København", "東京"]}, "_x": {}, "a": {}},
            },
        },
    },
    {"name": "now", "description": ""},
]
CALLS = [
    {
        "type": "function",
        "function": {"name": "weather", "arguments": {"ort": "東京", "a": [1.5, None, True]}},
    },
    {"function": {"name": "now", "arguments": {}}},
]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one line": [{"role": "user", "content": "Hi"}],
    "system": [{"role": "system", "content": "  Be brief.\n"}, {"role": "user", "content": "Hi\n\n"}],
    "several turns": [
        {"role": "user", "content": "Wie ist das Wetter?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nGut.", "name": "bot"},
        {"role": "user", "content": "!Und morgen? 😀", "name": "Zoë"},
        {"role": "assistant", "content": "Auch.", "reasoning_content": "\nmorgen\n"},
        {"role": "user", "content": "a < b && c > d"},
    ],
    "tools": [
        {"role": "system", "content": "Nutze Werkzeuge."},
        {"role": "user", "content": "Wetter?"},
        {"role": "assistant", "content": "", "reasoning_content": "Ich frage.", "tool_calls": CALLS},
        {"role": "tool", "content": '{"grad": 20}'},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "20 Grad.", "tool_calls": CALLS[1:]},
        {"role": "tool", "content": "13:00"},
    ],
}


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "offering tools"])
@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("thinking", [None, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_template_of_many_features(
    featured: tuple[Tokenizer, Any], conversation: str, tools: Any, generation: bool, thinking: bool | None
) -> None:
    ours, theirs = featured
    messages = CONVERSATIONS[conversation]
    extra = {} if thinking is None else {"enable_thinking": thinking}
    text, ids = (
        theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=generation, tokenize=t, return_dict=False, **extra
        )
        for t in (False, True)
    )
    options = {"tools": tools, "add_generation_prompt": generation, "enable_thinking": thinking}
    assert ours.render_chat(messages, **options) == text
    assert ours.apply_chat_template(messages, **options) == ids


@pytest.mark.parametrize("released", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tools", [None, TOOLS[:1]], ids=["", "offering tools"])
@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_released_template(
    with_template: Callable[[str], tuple[Tokenizer, Any]],
    conversation: str,
    tools: Any,
    thinking: bool | None,
    released: str,
) -> None:
    path = SHARED / released / "tokenizer_config.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here; set QWEN_QUANT_SHARED to the folder with tokenizers/")
    ours, theirs = with_template(json.loads(path.read_text(encoding="utf-8"))["chat_template"])
    messages = CONVERSATIONS[conversation]
    extra = {} if thinking is None else {"enable_thinking": thinking}
    expected = theirs.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_dict=False, **extra
    )
    assert ours.apply_chat_template(messages, tools=tools, enable_thinking=thinking) == expected


def test_a_template_refuses_in_its_own_words(featured: tuple[Tokenizer, Any]) -> None:
    with pytest.raises(ConfigError, match="nobody said anything") as caught:
        featured[0].apply_chat_template([{"role": "system", "content": "x"}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }",  # does not compile
        "{{ messages | nothing }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content % 2 }}",
        "{{ messages[7].role + 'x' }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ messages[0].content.__class__.__mro__[1].__subclasses__() }}",
        "{{ namespace(a=1).__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.join(['a'] * 3, 4) }}",
        "{{ 'x'.encode('nothing') }}",
        "{{ {} | dictsort(by='nothing') }}",
        "{{ '%d' % messages[0].content }}",
        "{% include 'other.jinja' %}",
        "{{ raise_exception('two\nlines') }}",
    ],
)
def test_a_template_that_fails_is_one_line(
    with_template: Callable[[str], tuple[Tokenizer, Any]], template: str
) -> None:
    tokenizer, _ = with_template(template)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: the chat template") as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert "\n" not in str(caught.value)
