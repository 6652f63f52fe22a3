"""A context on disk: the same text as without it, and files that do not belong are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_quant.errors import FormatError, OutputError, QwenQuantError
from qwen_quant.runtime import prompt_cache
from qwen_quant.runtime.session import Session

TinyModels = Callable[..., Any]
TOKENS = np.random.default_rng(8).integers(0, 96, 300).tolist()  # more than a page of the cache


@pytest.fixture
def session(tiny_model: TinyModels) -> Session:
    return Session.open(tiny_model("qwen3", "Q8_0").path)


@pytest.fixture
def saved(session: Session, tmp_path: Path) -> Path:
    session.prefill(TOKENS)
    path = tmp_path / "prompt.cache"
    prompt_cache.save(session, path)
    session.reset()
    return path


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3moe"])
@pytest.mark.parametrize("n_tokens", [1, 255, 256, 257, 300])
def test_a_loaded_context_is_the_one_that_was_saved(
    tiny_model: TinyModels, tmp_path: Path, architecture: str, n_tokens: int
) -> None:
    path = tiny_model(architecture, "Q4_0").path
    first, second = Session.open(path), Session.open(path, n_threads=1)
    first.prefill(TOKENS)
    prompt_cache.save(first, tmp_path / "cache", n_tokens)
    prompt_cache.load(second, tmp_path / "cache")
    assert second.n_past == n_tokens
    assert list(second.tokens) == TOKENS[:n_tokens]
    first.truncate(n_tokens)
    for _ in range(2):
        np.testing.assert_array_equal(second.extend([5, 6, 7]), first.extend([5, 6, 7]))


def test_only_what_differs_is_read(session: Session, saved: Path) -> None:
    prompt = [*TOKENS[:200], 3, 4, 5]
    expected = list(session.generate(prompt, 10))
    prompt_cache.load(session, saved)
    assert list(session.keep_shared(prompt)) == [3, 4, 5]
    assert list(session.generate([3, 4, 5], 10)) == expected


def test_other_models_are_refused(tiny_model: TinyModels, session: Session, saved: Path) -> None:
    for model in (
        tiny_model("qwen3", "Q4_0"),
        tiny_model("qwen2", "Q8_0"),
        tiny_model("qwen3", "Q8_0", tied=False),
    ):
        other = Session.open(model.path)
        with pytest.raises(FormatError, match="was made with another model file"):
            prompt_cache.load(other, saved)
        assert other.n_past == 0


def test_other_weights_under_the_same_header_are_refused(
    session: Session, saved: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(session.file.path, tmp_path / "model.gguf"))
    prompt_cache.load(Session.open(path), saved)  # the name does not matter
    place = session.file.tensors["blk.1.attn_k.weight"].offset
    data = bytearray(path.read_bytes())
    data[place + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="another model file"):
        prompt_cache.load(Session.open(path), saved)


def test_another_cache_type_is_refused(session: Session, saved: Path) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data.replace(b'"cache_type": "f16"', b'"cache_type": "q80"'))
    with pytest.raises(FormatError, match="another cache type"):
        prompt_cache.load(session, saved)


def test_damaged_files_are_refused(session: Session, saved: Path) -> None:
    data = saved.read_bytes()
    header = len(prompt_cache.MAGIC) + 4
    for cut in [*range(0, header + 220, 37), len(data) // 2, len(data) - 1]:
        saved.write_bytes(data[:cut])
        with pytest.raises(FormatError, match=r"no prompt cache|cut or damaged"):
            prompt_cache.load(session, saved)
        assert session.n_past == 0
    for place in (header - 1, header + 5, len(data) // 3, len(data) - 9):
        damaged = bytearray(data)
        damaged[place] ^= 0x40
        saved.write_bytes(damaged)
        with pytest.raises(FormatError):
            prompt_cache.load(session, saved)
        assert session.n_past == 0
    saved.write_bytes(data)
    prompt_cache.load(session, saved)
    assert session.n_past == 300


def test_a_context_too_small(session: Session, saved: Path) -> None:
    small = Session.open(session.file.path, n_ctx=299)
    with pytest.raises(FormatError, match="its 300 tokens do not fit into the context of 299"):
        prompt_cache.load(small, saved)


def test_nothing_is_left_of_a_file_that_cannot_be_written(session: Session, tmp_path: Path) -> None:
    session.prefill(TOKENS)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="another place with --prompt-cache"):
        prompt_cache.save(session, tmp_path / "file" / "cache")
    with pytest.raises(OutputError, match="is a folder; name a file with --prompt-cache"):
        prompt_cache.save(session, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_contexts_of_other_sizes(session: Session) -> None:
    session.prefill(TOKENS[:4])
    layers = [session.engine.read_kv(layer, 4) for layer in range(2)]
    assert session.engine.kv_bytes_per_token * 4 == sum(layer.nbytes for layer in layers)
    wrong: list[tuple[list[int], list[Any]]] = [
        (TOKENS[:4], layers[:1]),
        (TOKENS[:4], [*layers, layers[0]]),
        (TOKENS[:5], layers),
        ([], layers),
    ]
    for tokens, given in wrong:
        with pytest.raises(QwenQuantError):
            session.restore(tokens, given)
        assert session.n_past == 0
    session.restore(TOKENS[:4], layers)
    for layer, n_tokens in ((-1, 1), (2, 1), (0, 5), (0, -1)):
        with pytest.raises(QwenQuantError):
            session.engine.read_kv(layer, n_tokens)
