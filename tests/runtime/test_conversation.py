"""Later turns read only what is new, and say what a fresh session would."""

from __future__ import annotations

import pytest

from qwen_quant.checkpoint import Checkpoint, resolve_model
from qwen_quant.errors import QwenQuantError
from qwen_quant.exporters.gguf import export_gguf
from qwen_quant.runtime.conversation import Conversation
from qwen_quant.runtime.session import Session


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    path = tmp_path_factory.mktemp("gguf") / "reference.gguf"
    export_gguf(Checkpoint(resolve_model("reference")), path, "Q8_0")
    return Session.open(path, n_ctx=256)


def test_a_second_turn_reads_only_what_is_new(session: Session) -> None:
    session.reset()
    talk = Conversation(session)
    list(talk.ask([{"role": "user", "content": "Tell me about the sea."}], 8))
    list(talk.ask([{"role": "user", "content": "And the sky?"}], 8))
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.completion is not None
    ids = session.tokenizer.apply_chat_template(talk.messages[:3])
    assert session.timings.prompt_tokens < len(ids)
    session.reset()
    assert list(session.generate(ids, 8, stop_ids=session.eos_ids)) == talk.completion.tokens


def test_lookup_changes_no_conversation(session: Session) -> None:
    outcomes = []
    for draft_max in (0, 6):
        session.reset()
        session.draft_max = draft_max
        talk = Conversation(session)
        list(talk.ask([{"role": "user", "content": "Say it again: the sea, the sea, the sea."}], 30))
        broken_off = talk.ask([{"role": "user", "content": "Once more."}], 40)
        next(broken_off)
        broken_off.close()
        list(talk.ask([{"role": "user", "content": "And again."}], 20))
        outcomes.append((talk.messages, list(session.tokens), session.n_past, session.timings.prompt_tokens))
    session.draft_max = 0
    assert outcomes[0] == outcomes[1]


def test_truncated_context_and_its_tokens(session: Session) -> None:
    session.reset()
    session.prefill([5, 6, 7, 8])
    assert list(session.keep_shared([5, 6, 9])) == [9]
    assert list(session.tokens) == [5, 6]
    assert list(session.keep_shared([5, 6])) == [6]
    with pytest.raises(QwenQuantError, match="cannot keep 2"):
        session.truncate(2)


def test_a_full_context_is_an_error_and_leaves_the_history(session: Session) -> None:
    talk = Conversation(session)
    with pytest.raises(QwenQuantError, match="leaves no room in the context of 256"):
        list(talk.ask([{"role": "user", "content": "word " * 300}]))
    assert talk.messages == []


def test_an_answer_broken_off_is_kept(session: Session) -> None:
    talk = Conversation(session)
    pieces = talk.ask([{"role": "user", "content": "Tell me about the sea."}], 40)
    next(pieces)
    pieces.close()
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
