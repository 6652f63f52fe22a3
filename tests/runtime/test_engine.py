"""The engine against transformers, and against itself: in pieces, other instruction sets, other threads."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.isas import is_exact

from qwen_quant import _core
from qwen_quant.errors import QwenQuantError
from qwen_quant.runtime.gguf import GGUFFile
from qwen_quant.runtime.sampling import SamplingParams
from qwen_quant.runtime.session import Session

TinyModels = Callable[..., Any]
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]
ARCHITECTURES = [("qwen2", True, 32), ("qwen2", False, 32), ("qwen3", True, 48), ("qwen3", False, 24)]
TOKENS = np.random.default_rng(3).integers(0, 96, 70).astype(np.int32)


def kld(reference: np.ndarray, logits: np.ndarray) -> float:
    """Mean over tokens of KL(softmax(reference) || softmax(logits)), both [T, V]."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        shifted = x - x.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    p, q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize("isa", _core.cpu_isas())
@pytest.mark.parametrize(("architecture", "tied", "head_dim"), ARCHITECTURES)
@pytest.mark.parametrize("tensor_type", TYPES)
def test_logits_equal_transformers(
    tiny_model: TinyModels, architecture: str, tied: bool, head_dim: int, tensor_type: str, isa: str
) -> None:
    model = tiny_model(architecture, tensor_type, tied=tied, head_dim=head_dim)
    logits = Session.open(model.path, isa=isa, n_threads=2).logits(TOKENS)
    reference = model.reference_logits(TOKENS)
    assert logits.shape == reference.shape
    difference = np.abs(logits - reference).max()
    if is_exact(tensor_type, isa):
        # What is left is cached keys and values that fell on the other side of an FP16 rounding.
        assert np.median(np.abs(logits - reference)) < 3e-4
        assert difference < 3e-3
    else:  # int8 or BF16 activations
        assert kld(reference, logits) < 1e-3
        assert difference < 0.4


@pytest.mark.parametrize("isa", _core.cpu_isas())
@pytest.mark.parametrize("tensor_type", ["F16", "Q4_0", "Q4_1"])
def test_steps_threads_and_chunks_change_nothing(tiny_model: TinyModels, tensor_type: str, isa: str) -> None:
    path = tiny_model("qwen3", tensor_type).path
    whole = Session.open(path, isa=isa, n_threads=1)
    expected = whole.logits(TOKENS)
    other = Session.open(path, isa=isa, n_threads=3)
    np.testing.assert_array_equal(other.logits(TOKENS), expected)
    other.reset()
    np.testing.assert_array_equal(other.prefill(TOKENS[:40]), expected[39])
    for position in range(40, len(TOKENS)):
        np.testing.assert_array_equal(other.step(int(TOKENS[position])), expected[position])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_packed_weights_leave_the_mapped_file(tiny_model: TinyModels, tmp_path: Path) -> None:
    """What was packed is in memory once; what decoding the file needs is read again."""
    path = Path(shutil.copy(tiny_model("qwen3", "Q8_0", tied=True).path, tmp_path))
    session = Session.open(path, n_threads=2)
    session.step(1)
    resident, lines = 0, iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            resident += next(int(rest.split()[1]) for rest in lines if rest.startswith("Rss:"))
    if _core.packed_types():
        assert resident * 1024 < path.stat().st_size / 2
    again = GGUFFile(path)
    for name in ("blk.0.attn_q.weight", "token_embd.weight"):
        np.testing.assert_array_equal(session.file.read_tensor(name), again.read_tensor(name))


def test_prompts_longer_than_a_chunk_and_a_cache_page(tiny_model: TinyModels) -> None:
    model = tiny_model("qwen2", "F32")
    tokens = np.random.default_rng(4).integers(0, 96, 500).astype(np.int32)
    session = Session.open(model.path)
    logits = session.logits(tokens)
    assert np.abs(logits - model.reference_logits(tokens)).max() < 4e-3
    session.reset()
    np.testing.assert_array_equal(session.prefill(tokens), logits[-1])
    assert session.n_past == 500


def test_going_back_in_the_context(tiny_model: TinyModels) -> None:
    engine = _core.Engine(str(tiny_model("qwen3", "Q8_0").path))
    first = engine.forward(TOKENS[:30], 0)
    engine.forward(TOKENS[30:40], 30)
    np.testing.assert_array_equal(engine.forward(TOKENS[20:30], 20), first)
    assert engine.n_past == 30


@pytest.mark.parametrize("tensor_type", ["F16", "Q8_0", "Q4_0"])
def test_every_instruction_set_writes_the_same_text(tiny_model: TinyModels, tensor_type: str) -> None:
    path = tiny_model("qwen3", tensor_type).path
    prompt = TOKENS[:8].tolist()
    text = list(Session.open(path, isa="scalar").generate(prompt, 48))
    assert len(text) == 48
    for isa in _core.cpu_isas():
        logits = Session.open(path, isa=isa).logits(np.array([*prompt, *text[:-1]], np.int32))[7:]  # [48, V]
        lost = logits.max(-1) - logits[np.arange(48), text]
        # Sums that differ in the last bit may round an activation to the next of its 8-bit codes.
        assert lost.max() < (0 if tensor_type == "F16" else 0.05) * logits.std() + 1e-6
        assert (lost > 0).sum() <= (0 if tensor_type == "F16" else 1)


def test_generate_stops_counts_and_repeats(tiny_model: TinyModels) -> None:
    session = Session.open(tiny_model("qwen2", "Q4_0").path)
    assert session.eos_ids == {94, 95}
    prompt = TOKENS[:8].tolist()
    full = list(session.generate(prompt, 12))
    assert session.timings.prompt_tokens == 8
    assert session.timings.tg_tokens == 11
    session.reset()
    stop = full[6]
    assert list(session.generate(prompt, 12, stop_ids={stop})) == full[: full.index(stop)]
    sampled = []
    for _ in range(2):
        session.reset()
        params = SamplingParams(temperature=1.5, top_k=40, top_p=0.95, min_p=0.01, seed=7)
        sampled.append(list(session.generate(prompt, 12, params)))
    assert sampled[0] == sampled[1] != full


@pytest.mark.parametrize("vocab_size", [96, 103])
def test_the_most_likely_token_is_the_first_largest_logit(tiny_model: TinyModels, vocab_size: int) -> None:
    session = Session.open(tiny_model("qwen3", "Q8_0", vocab_size=vocab_size).path)
    assert session.n_vocab == vocab_size
    largest = session.logits(TOKENS).argmax(axis=1)
    chosen = []
    for n_past in range(0, 70, 7):
        session.truncate(n_past)
        chosen.append(session.most_likely(TOKENS[n_past : n_past + 7].tolist()))
        assert list(session.tokens) == TOKENS[: n_past + 7].tolist()
    assert chosen == largest[6::7].tolist()
    assert largest.max() >= 96 or vocab_size == 96  # the last lanes are looked at


@pytest.mark.parametrize("tokens", [[], [96], [-1], [2**40], [0.5], [[1, 2]]])
def test_bad_tokens(tiny_model: TinyModels, tokens: list[Any]) -> None:
    session = Session.open(tiny_model("qwen2", "Q4_0").path)
    messages = []
    for read in (session.prefill, session.most_likely):
        with pytest.raises(QwenQuantError) as caught:
            read(tokens)
        messages.append(str(caught.value))
        assert session.n_past == 0
    assert messages[0] == messages[1]


def test_the_context_is_never_cut_silently(tiny_model: TinyModels) -> None:
    path = tiny_model("qwen2", "Q4_0").path
    session = Session.open(path, n_ctx=10)
    session.prefill(TOKENS[:8])
    with pytest.raises(QwenQuantError, match="exceed the context of 10"):
        session.prefill(TOKENS[:3])
    assert session.n_past == 8
    with pytest.raises(QwenQuantError, match="exceed the context of 512"):
        Session.open(path).prefill(np.zeros(513, dtype=np.int32))


def test_ctrl_c_ends_a_long_prompt(tiny_model: TinyModels) -> None:
    session = Session.open(tiny_model("qwen2", "Q4_0").path, n_ctx=10**6)
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            session.prefill(np.zeros(10**6, dtype=np.int32))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert 0 < session.n_past < 10**6
    session.reset()
    assert session.engine.kv_bytes == 0
    assert np.isfinite(session.prefill(TOKENS)).all()


def test_threads_do_not_mix_requests(tiny_model: TinyModels) -> None:
    """Two Python threads on one engine: each request is served whole."""
    engine = _core.Engine(str(tiny_model("qwen2", "Q4_0").path), n_threads=2)
    expected = engine.forward(TOKENS, 0)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: engine.forward(TOKENS, 0), range(20)))
    for logits in results:
        np.testing.assert_array_equal(logits, expected)


def test_unknown_options(tiny_model: TinyModels) -> None:
    path = tiny_model("qwen2", "Q4_0").path
    with pytest.raises(QwenQuantError, match=r"isa 'sse' .* auto, scalar"):
        Session.open(path, isa="sse")
    with pytest.raises(QwenQuantError, match="n_threads"):
        Session.open(path, n_threads=-1)
