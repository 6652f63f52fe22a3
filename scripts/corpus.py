"""Reading the training corpus: a folder of .txt files, the tail of each held out, questions as ChatML."""

from __future__ import annotations

import re
from pathlib import Path

HELD_OUT = 0.015  # the last 1.5% of each file is never trained on
END = "<|endoftext|>"
QUESTION = re.compile(r"Question: (.*?)\nAnswer: (.*?)\n#### (.*?)(?:\n\n|\Z)", re.S)


def as_chat(text: str) -> str:
    """GSM8K's question/answer records as ChatML conversations."""
    turns = [
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}\nThe answer is {final}.<|im_end|>\n"
        for question, answer, final in QUESTION.findall(text)
    ]
    return END.join(turns)


def read_split(folder: Path) -> tuple[list[str], list[str]]:
    """Training and held-out texts, one of each per file in `folder`."""
    train, held_out = [], []
    for path in sorted(folder.glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        if path.name.startswith("qa_"):
            text = as_chat(text)
        cut = int(len(text) * (1 - HELD_OUT))
        train.append(text[:cut])
        held_out.append(text[cut:])
    if not train:
        raise SystemExit(f"{folder}: no .txt files; name a folder of plain text with --corpus")
    return train, held_out
