"""Calibration text: what ships with the package, a user's files, or a Hugging Face data set; and the sampling
of token windows from it.

A document is text or a list of chat messages. Special tokens spelled in a document's text (ChatML) are meant:
they become tokens, because that is what an instruct model sees.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qwen_quant.errors import CalibrationError, QwenQuantError
from qwen_quant.tokenizer import Tokenizer

BUILTIN = "builtin"
SUFFIXES = (".txt", ".jsonl")
# A longer text file is cut at line ends, so that only the parts that are sampled must be tokenized.
PART = 1 << 16  # characters
MAX_ROWS = 4096  # rows read from a Hugging Face data set
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::([\w.\[\]%-]+))?")


class ShortCalibrationWarning(UserWarning):
    """The data gave fewer windows than were asked for."""


@dataclass(frozen=True)
class Document:
    """A piece of calibration data: `text`, or chat `messages`; every `kind` is represented in a sample."""

    source: str
    kind: str
    text: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids, special tokens included."""
        if self.messages:
            return tokenizer.apply_chat_template(self.messages, add_generation_prompt=False)
        return tokenizer.encode(self.text, special=True)


def load(dataset: str) -> list[Document]:
    """The documents that `dataset` names.

    It is "builtin", a .txt file, a .jsonl file (objects with `text`, `messages`, `content`, or `prompt` and
    `completion`), a folder of those, or a Hugging Face data set `org/name[/config][:split]`.
    Raises CalibrationError naming the file (and line) that is missing, unreadable or holds no text.
    """
    path = Path(__file__).parent if dataset == BUILTIN else Path(dataset).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        found = [document for file in files for document in _load_file(file, str(file.relative_to(path)))]
    elif path.is_file():
        found = list(_load_file(path, path.name))
    else:
        found = _load_hub(dataset)
    if not found:
        raise CalibrationError(
            f"{dataset}: holds no text to calibrate with; give .txt or .jsonl files with text"
        )
    return found


def _load_file(path: Path, kind: str) -> Iterator[Document]:
    if path.suffix not in SUFFIXES:
        raise CalibrationError(
            f"{path}: calibration data must be a .txt or .jsonl file, a folder, or 'builtin'"
        )
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: is not UTF-8 text (byte {error.start}); convert it to UTF-8"
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix == ".txt":
        yield from (Document(str(path), kind, part) for part in _parts(content) if part.strip())
        return
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise CalibrationError(
                f"{path}: line {number} is not JSON; each line must be one object"
            ) from None
        document = _from_row(row, str(path), kind)
        if document is None:
            raise CalibrationError(
                f"{path}: line {number} has none of text, messages, content, prompt with completion"
            )
        if document.messages or document.text.strip():
            yield document


def _parts(content: str) -> Iterator[str]:
    """A text whole, or a long one in parts that end where lines do."""
    start = 0
    while len(content) - start > 2 * PART:
        end = content.find("\n", start + PART, start + 2 * PART) + 1 or start + PART
        yield content[start:end]
        start = end
    yield content[start:]


def _from_row(row: Any, source: str, kind: str) -> Document | None:
    """The document in a JSON object, None when it has no key we know."""
    if not isinstance(row, Mapping):
        return None
    messages = row.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(m, Mapping) for m in messages):
        return Document(source, kind, messages=tuple(messages))
    for keys in (("text",), ("content",), ("prompt", "completion")):
        values = [row.get(key) for key in keys]
        if all(isinstance(value, str) for value in values):
            return Document(source, kind, "".join(map(str, values)))
    return None


def _load_hub(dataset: str) -> list[Document]:
    name = _HUB_NAME.fullmatch(dataset)
    if name is None or dataset.endswith(SUFFIXES):
        raise CalibrationError(
            f"{dataset}: no such file or folder; give a .txt or .jsonl file, a folder, 'builtin', or a "
            "Hugging Face data set org/name[/config][:split]"
        )
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"{dataset}: no such file here; to read it from Hugging Face, pip install 'qwen-quant[hub]'"
        ) from None
    repository, config, split = name.groups()
    try:
        rows = load_dataset(repository, config, split=split or "train", streaming=True)
        documents = [_from_row(row, dataset, dataset) for row in islice(rows, MAX_ROWS)]
    except Exception as error:  # the library raises many kinds; all mean that the data did not come
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CalibrationError(f"{dataset}: cannot be read from Hugging Face ({reason})") from None
    return [d for d in documents if d is not None and (d.messages or d.text.strip())]


def fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 (hex) of what the documents say, in their order, wherever they lie."""
    digest = hashlib.sha256()
    for document in documents:
        content = [document.text, list(document.messages)]
        digest.update(json.dumps(content, ensure_ascii=True, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def sample(
    documents: Sequence[Document], tokenizer: Tokenizer, num_samples: int, seq_len: int, seed: int = 0
) -> np.ndarray:
    """Windows of token ids, int32 [num_samples, seq_len], every one of them full; the same for the same seed.

    Each kind of document gets its share of the tokens. A document longer than a window is cut into windows,
    of which a random choice is taken; shorter ones follow each other, parted by the end-of-text token.
    Data that is too short gives fewer windows with a ShortCalibrationWarning; less than one window is a
    CalibrationError that names the data.
    """
    if num_samples < 1 or seq_len < 1:
        raise CalibrationError(f"--num-samples {num_samples} and --seq-len {seq_len} must both be at least 1")
    if not documents:
        raise CalibrationError("the calibration data holds no documents; give .txt or .jsonl files with text")
    rng = np.random.default_rng(seed)
    budget = num_samples * seq_len
    end = _end_of_text(tokenizer)
    kinds = sorted({document.kind for document in documents})
    pieces = [
        _pieces([d for d in documents if d.kind == kind], tokenizer, seq_len, budget, end, rng)
        for kind in kinds
    ]
    totals = [sum(map(len, kind)) for kind in pieces]
    taken = [
        p
        for kind, quota in zip(pieces, _quotas(totals, budget), strict=True)
        for p in _take(kind, quota, end)
    ]
    # Pieces that are whole windows come first: they stay unbroken, and the others share the rest.
    order = sorted(rng.permutation(len(taken)), key=lambda i: len(taken[i]) < seq_len)
    stream = np.concatenate([taken[i] for i in order]) if taken else np.empty(0, np.int32)
    count = min(num_samples, len(stream) // seq_len)
    names = _names(documents)
    if count == 0:
        raise CalibrationError(
            f"{names}: {len(stream)} tokens are less than one window of {seq_len}; "
            "give more text or a smaller --seq-len"
        )
    if count < num_samples:
        warnings.warn(
            f"{names}: enough text for {count} windows of {seq_len} tokens, not {num_samples}; "
            "give more text or a smaller --seq-len",
            ShortCalibrationWarning,
            stacklevel=2,
        )
    return stream[: count * seq_len].reshape(count, seq_len)


def _names(documents: Sequence[Document]) -> str:
    """The file the documents come from, or their folder."""
    sources = sorted({document.source for document in documents})
    return sources[0] if len(sources) == 1 else str(Path(sources[0]).parent)


def _end_of_text(tokenizer: Tokenizer) -> list[int]:
    token = tokenizer.token_id("<|endoftext|>")
    return [*tokenizer.eos_ids[-1:]] if token is None else [token]


def _pieces(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    seq_len: int,
    budget: int,
    end: list[int],
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Documents of one kind in random order, tokenized until `budget` is met, cut to `seq_len`, shuffled."""
    found: list[np.ndarray] = []
    total = 0
    for i in rng.permutation(len(documents)):
        document = documents[i]
        try:
            ids = np.array(document.encode(tokenizer) + end, dtype=np.int32)
        except QwenQuantError as error:
            raise CalibrationError(f"{document.source}: a conversation cannot be rendered: {error}") from None
        found += [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
        total += len(ids)
        if total >= budget:
            break
    return [found[i] for i in rng.permutation(len(found))]


def _quotas(totals: Sequence[int], budget: int) -> list[int]:
    """How many tokens each kind gives: in proportion to its size, `budget` together where there is enough."""
    everything = sum(totals)
    if everything <= budget:
        return list(totals)
    exact = [budget * total / everything for total in totals]
    quotas = [int(share) for share in exact]
    by_fraction = sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])
    for i in by_fraction[: budget - sum(quotas)]:
        quotas[i] += 1
    return quotas


def _take(pieces: Iterable[np.ndarray], quota: int, end: list[int]) -> Iterator[np.ndarray]:
    """Pieces until `quota` tokens; the last is cut and closed."""
    for piece in pieces:
        if quota <= 0:
            return
        if len(piece) > quota:
            piece = piece[:quota].copy()
            piece[-1:] = end[-1:] or piece[-1:]
        quota -= len(piece)
        yield piece
