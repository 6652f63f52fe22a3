"""Outputs appear whole or not at all, and a refusal of the system is one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_quant.errors import OutputError
from qwen_quant.files import atomic_file, atomic_folder


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out.bin"
    with atomic_file(target) as partial:
        partial.write_bytes(b"abc")
        assert not target.exists()
        assert partial.parent == target.parent
    assert target.read_bytes() == b"abc"
    assert list(target.parent.iterdir()) == [target]


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(target) as partial:
        partial.write_text("ne")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    with atomic_file(target) as partial:
        partial.write_text("new")
    assert target.read_text() == "new"


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "sub" / "a.txt").read_text() == "a"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_broken_run_leaves_no_folder(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "out") as partial:
        (partial / "a.txt").write_text("a")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="not empty"), atomic_folder(target):
        pass
    with pytest.raises(KeyboardInterrupt), atomic_folder(target, overwrite=True):
        raise KeyboardInterrupt
    assert (target / "config.json").exists()
    with atomic_folder(target, overwrite=True) as partial:
        (partial / "new.txt").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new.txt"]


def test_overwriting_never_removes_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(OutputError, match="no checkpoint"), atomic_folder(tmp_path, overwrite=True):
        pass
    assert (tmp_path / "letters.txt").read_text() == "dear"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with atomic_folder(target) as partial:
        (partial / "a.txt").write_text("a")
    assert (target / "a.txt").exists()


def test_the_kinds_of_output_are_not_mixed_up(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(OutputError, match="name a folder"), atomic_folder(file):
        pass
    with pytest.raises(OutputError, match="name a file"), atomic_file(tmp_path):
        pass
    assert file.read_text() == "x"


@pytest.mark.parametrize("make", [atomic_file, atomic_folder])
def test_a_place_that_cannot_be_written_is_one_line(make: Callable[..., Any], tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("x")
    with pytest.raises(OutputError, match="cannot be written") as caught, make(blocker / "out"):
        pass
    assert "\n" not in str(caught.value)
    assert str(blocker / "out") in str(caught.value)


def test_a_write_that_fails_halfway_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left"), atomic_file(tmp_path / "out") as partial:
        partial.write_text("half")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".", "/", ".."])
def test_names_that_are_only_a_place(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept.txt").write_text("x")
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path if name == "." else tmp_path / "inner")
    with pytest.raises(OutputError, match="name a file"), atomic_file(Path(name)):
        pass
    with pytest.raises(OutputError, match="not empty"), atomic_folder(Path(name)):
        pass
    assert (tmp_path / "kept.txt").exists()


def test_the_current_folder_is_filled_when_it_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic_folder(Path()) as partial:
        (partial / "a.txt").write_text("a")
    assert (tmp_path / "a.txt").exists()
