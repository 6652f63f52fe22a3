"""Perplexity: the windows, the tokens, the numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qwen_quant.errors import QwenQuantError, UsageError
from qwen_quant.evaluate.perplexity import Perplexity, cut_windows, log_softmax, tokenize
from qwen_quant.tokenizer import Tokenizer


def test_windows_are_consecutive_and_whole() -> None:
    tokens = np.arange(35, dtype=np.int32)
    assert cut_windows(tokens, 10).tolist() == [list(range(i, i + 10)) for i in (0, 10, 20)]
    assert len(cut_windows(tokens, 10, max_windows=2)) == 2
    assert len(cut_windows(tokens, 10, max_windows=9)) == 3


def test_a_text_shorter_than_a_window_names_the_remedy() -> None:
    with pytest.raises(QwenQuantError, match=r"35 tokens, less than one window of 36; .*--data.*--ctx"):
        cut_windows(np.arange(35, dtype=np.int32), 36)


@pytest.mark.parametrize(("ctx", "max_windows"), [(4, None), (0, None), (-8, None), (8, 0), (8, -1)])
def test_senseless_windows_are_wrong_usage(ctx: int, max_windows: int | None) -> None:
    with pytest.raises(UsageError, match=r"--ctx|--max-windows"):
        cut_windows(np.arange(35, dtype=np.int32), ctx, max_windows)


def test_control_tokens_stay_text_and_others_are_found(tokenizer: Tokenizer) -> None:
    think, turn = tokenizer.token_id("<think>"), tokenizer.token_id("<|im_end|>")
    ids = tokenize(tokenizer, "one <think>two</think> three<|im_end|>").tolist()
    assert think in ids
    assert turn not in ids
    assert tokenizer.decode(ids) == "one <think>two</think> three<|im_end|>"
    assert tokenize(tokenizer, "plain text").tolist() == tokenizer.encode("plain text")


def test_log_softmax_is_stable() -> None:
    logits = np.array([[1e4, 1e4 - 1.0, -1e4], [0.0, 0.0, 0.0]], dtype=np.float32)
    found = log_softmax(logits)
    assert np.exp(found).sum(axis=-1) == pytest.approx([1.0, 1.0], abs=1e-12)
    assert found[0, 1] - found[0, 0] == pytest.approx(-1.0)
    assert found[1].tolist() == pytest.approx([-math.log(3)] * 3)


def test_perplexity_and_its_standard_error() -> None:
    measured = Perplexity()
    probabilities = np.array([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
    measured.add(np.log(probabilities), np.array([0, 2], dtype=np.int32))
    measured.add(np.log(probabilities[:1]), np.array([1], dtype=np.int32))
    nll = np.log([2.0, 8.0, 4.0])
    assert measured.tokens == 3
    assert measured.value == pytest.approx(4.0)
    assert measured.stderr == pytest.approx(4.0 * nll.std(ddof=1) / math.sqrt(3))
