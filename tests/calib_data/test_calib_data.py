"""Loading calibration data in every shape, and windows that are full, repeatable and representative."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qwen_quant import calib_data
from qwen_quant.calib_data import Document, ShortCalibrationWarning, fingerprint, load, sample
from qwen_quant.errors import CalibrationError
from qwen_quant.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(reference: Path) -> Tokenizer:
    return Tokenizer.from_folder(reference)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_builtin_is_large_and_varied() -> None:
    documents = load("builtin")
    assert len(documents) >= 128
    assert sum(len(d.text.encode()) for d in documents) >= 200_000
    assert len({d.text for d in documents}) == len(documents)
    dialogues = [d.text for d in documents if d.kind.startswith("dialogue")]
    assert all(text.startswith("<|im_start|>") for text in dialogues)
    assert 5 < sum("<think>" in text for text in dialogues) < len(dialogues) - 5
    assert sum(bool(re.search("[一-龥]{10}", d.text)) for d in documents) >= 30


def test_sources_lists_what_is_there() -> None:
    table = (Path(calib_data.__file__).parent / "SOURCES.md").read_text(encoding="utf-8")
    for path in Path(calib_data.__file__).parent.glob("*.jsonl"):
        texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        row = next(line for line in table.splitlines() if f"`{path.name}`" in line)
        assert row.endswith(f"| {len(texts)} | {sum(len(t.encode()) for t in texts):,} |")
    assert "Apache-2.0" in table


def test_file_formats(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Hello."}]
    rows = [
        {"text": "one"},
        {"messages": chat},
        {"content": "two"},
        {"prompt": "three ", "completion": "four"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {"text": "  "}])
    (tmp_path / "b.txt").write_text("five\n\nsix\n")
    (tmp_path / "notes.md").write_text("not data")
    from_file = load(str(path))
    assert [d.text for d in from_file] == ["one", "", "two", "three four"]
    assert from_file[1].encode(tokenizer) == tokenizer.apply_chat_template(chat, add_generation_prompt=False)
    assert [d.text for d in load(str(tmp_path))] == ["one", "", "two", "three four", "five\n\nsix\n"]


def test_long_text_is_cut_without_loss(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(60_000)) + "x" * 300_000
    (tmp_path / "long.txt").write_text(text)
    documents = load(str(tmp_path / "long.txt"))
    assert len(documents) > 3
    assert "".join(d.text for d in documents) == text
    assert documents[0].text.endswith("\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n", "holds no text"),
        ("empty.jsonl", b"\n", "holds no text"),
        ("latin.txt", b"caf\xe9", "UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("other.jsonl", b'{"body": "a"}', "line 1 has none of"),
        ("list.jsonl", b"[1]", "line 1 has none of"),
        ("data.csv", b"a,b", "must be a .txt or .jsonl"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        load(str(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dataset", ["nowhere.txt", "/no/such/folder", "./x.jsonl", "word"])
def test_missing_data_is_named(dataset: str) -> None:
    with pytest.raises(CalibrationError, match=re.escape(dataset)):
        load(dataset)


def test_hugging_face_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, config, split, streaming))
        if name == "org/gone":
            raise ConnectionError("no route to host\nand more")
        return [{"text": "a"}, {"text": ""}, {"label": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [d.text for d in load("org/set:validation")] == ["a"]
    load("org/set/sub-1")
    assert asked == [("org/set", None, "validation", True), ("org/set", "sub-1", "train", True)]
    with pytest.raises(CalibrationError, match=r"org/gone.*no route to host\)$"):
        load("org/gone")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"org/set.*qwen-quant\[hub\]"):
        load("org/set")


def test_windows_are_full_repeatable_and_seeded(tokenizer: Tokenizer) -> None:
    documents = load("builtin")
    windows = sample(documents, tokenizer, 24, 256, seed=3)
    assert windows.shape == (24, 256)
    assert windows.dtype == np.int32
    assert windows.min() >= 0 and windows.max() < tokenizer.vocab_size
    assert np.array_equal(windows, sample(documents, tokenizer, 24, 256, seed=3))
    assert not np.array_equal(windows, sample(documents, tokenizer, 24, 256, seed=4))
    for spelling in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>"):
        assert (windows == tokenizer.token_id(spelling)).any()


def test_every_kind_is_represented(tokenizer: Tokenizer) -> None:
    marks = "①②③④⑤⑥"
    documents = [Document("s", f"kind{i}", mark * (40 if i else 4000)) for i, mark in enumerate(marks)]
    text = tokenizer.decode(sample(documents, tokenizer, 8, 128).ravel())
    assert all(mark in text for mark in marks)


def test_long_documents_stay_unbroken(tokenizer: Tokenizer) -> None:
    text = " ".join(str(i) for i in range(9000))
    ids = tokenizer.encode(text)
    whole = np.array(ids, dtype=np.int32)
    for window in sample([Document("s", "k", text)], tokenizer, 6, 200):
        starts = np.flatnonzero(whole == window[0])
        assert any(np.array_equal(whole[s : s + 200], window) for s in starts)


def test_short_data_warns_and_too_short_data_fails(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("word " * 200)
    documents = load(str(tmp_path / "short.txt"))
    with pytest.warns(ShortCalibrationWarning, match=r"short\.txt"):
        windows = sample(documents, tokenizer, 100, 32)
    assert 0 < len(windows) < 100
    with pytest.raises(CalibrationError, match=r"short\.txt.*less than one window of 4096"):
        sample(documents, tokenizer, 1, 4096)
    with pytest.raises(CalibrationError, match="at least 1"):
        sample(documents, tokenizer, 0, 8)
    with pytest.raises(CalibrationError, match="no documents"):
        sample([], tokenizer, 1, 8)


def test_a_conversation_that_cannot_be_rendered_names_its_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": [{"content": "no role"}]}])
    with pytest.raises(CalibrationError, match=r"chat\.jsonl"):
        sample(load(str(path)), tokenizer, 1, 4)


def test_fingerprint_depends_on_content_only(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("same")
    (tmp_path / "three.txt").write_text("other")
    one, two, three = (load(str(tmp_path / name)) for name in ("one", "two", "three.txt"))
    assert fingerprint(one) == fingerprint(two) != fingerprint(three)
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(one))
