"""`qwen.tiktoken` against the tiktoken package over the same ranks."""

from __future__ import annotations

import shutil
import unicodedata
from base64 import b64encode
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_quant.errors import ConfigError
from qwen_quant.tokenizer import Tokenizer

tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
# Qwen (1)'s published pattern, in the syntax of tiktoken.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            ["'s", " the", "12", "人们", "\r\n", "  ", "é", "e\u0301", "<|im_end|>", "<|extra_3|>"]
        ),
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, qwen1_ranks: dict[bytes, int]) -> Path:
    folder = tmp_path_factory.mktemp("qwen1")
    lines = (b64encode(token) + b" %d\n" % rank for token, rank in qwen1_ranks.items())
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}')
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def oracle(qwen1_ranks: dict[bytes, int]) -> tiktoken.Encoding:
    start = len(qwen1_ranks)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
    special = {name: start + i for i, name in enumerate(names)}
    return tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=qwen1_ranks, special_tokens=special)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS)
def test_encodes_as_tiktoken_does(tokenizer: Tokenizer, oracle: tiktoken.Encoding, text: str) -> None:
    normal = unicodedata.normalize("NFC", text)  # as the released tokenizer does first
    assert tokenizer.encode(text) == oracle.encode(normal, disallowed_special=())
    assert tokenizer.encode(text, special=True) == oracle.encode(normal, allowed_special="all")
    assert tokenizer.decode(tokenizer.encode(text)) == normal


def test_special_tokens_follow_the_vocabulary(tokenizer: Tokenizer, oracle: tiktoken.Encoding) -> None:
    for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"):
        assert tokenizer.token_id(name) == oracle.encode_single_token(name)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [(b"not base64!! 7\n", "line"), (b"QUJD\n", "line"), (b"cXF6emp4 4091\n", "two tokens of lower ranks")],
)
def test_a_damaged_file_is_one_clear_line(folder: Path, tmp_path: Path, line: bytes, complaint: str) -> None:
    shutil.copytree(folder, tmp_path / "bad")
    with (tmp_path / "bad" / "qwen.tiktoken").open("ab") as file:
        file.write(line)
    with pytest.raises(ConfigError, match=complaint) as caught:
        Tokenizer.from_folder(tmp_path / "bad")
    assert "qwen.tiktoken" in str(caught.value) and "\n" not in str(caught.value)
