"""The engine's quantized cache against the reference model's, which rounds the same numbers by other code."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers.checkpoints import QWEN3_MOE

from qwen_quant import _core
from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import FormatError, QwenQuantError
from qwen_quant.evaluate.divergence import kl_divergence
from qwen_quant.evaluate.perplexity import log_softmax
from qwen_quant.exporters.gguf import export_gguf
from qwen_quant.grids.kv import Half, TokenGroups
from qwen_quant.grids.kv_layout import RECENT, KVCacheSpec, KVLayer, KVLayout
from qwen_quant.model import load_model
from qwen_quant.model.kv_cache import new_quantized_cache
from qwen_quant.quantize.kv_weights import weights_layout
from qwen_quant.runtime import prompt_cache
from qwen_quant.runtime.sampling import SamplingParams
from qwen_quant.runtime.session import Session
from qwen_quant.safetensors import Planned, SafetensorsWriter

SHAPE = {"hidden_size": 256, "head_dim": 64, "vocab_size": 4112, "num_attention_heads": 6, "rope_theta": 1e6}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 384,
    "head_dim": None,
}
TOKENS = (
    np.random.default_rng(3).integers(0, 4000, 330).astype(np.int32)
)  # more than a page, not whole blocks


@pytest.fixture
def make(make_checkpoint: Callable[..., Path], reference: Path) -> Callable[..., Checkpoint]:
    """A tiny checkpoint with heads of 64 and the bundled tokenizer."""

    def build(**changes: object) -> Checkpoint:
        folder = make_checkpoint(**{**SHAPE, **changes})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(reference / name, folder)
        return Checkpoint(folder)

    return build


def calibrated(heads: int = 2) -> KVCacheSpec:
    """A layout that has everything: centres of some pairs, balances, rotation, types that differ."""
    rng = np.random.default_rng(5)

    def vectors() -> np.ndarray:
        return rng.standard_normal((heads, 64)).astype(np.float32)

    centre = 20 * vectors()
    centre[:, 5:32] = centre[:, 37:] = 0  # five pairs
    keys = KVLayout(TokenGroups(4), centre, np.exp(0.5 * vectors()), True)
    values = KVLayout(TokenGroups(8), vectors(), np.exp(0.5 * vectors()), True)
    first = KVLayer(keys, values)
    second = KVLayer(replace(keys, grid=Half()), replace(values, grid=TokenGroups(4), hadamard=False))
    return KVCacheSpec("auto", (first, second), RECENT)


def torch_logits(checkpoint: Checkpoint, spec: KVCacheSpec | None, tokens: np.ndarray = TOKENS) -> np.ndarray:
    with torch.no_grad():
        caches = None if spec is None else new_quantized_cache(spec)
        return load_model(checkpoint)(torch.from_numpy(tokens)[None].long(), caches)[0].numpy()


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    return float(kl_divergence(log_softmax(reference), log_softmax(other)).mean())


def exported(checkpoint: Checkpoint, layout: KVCacheSpec | None = None) -> Path:
    path = checkpoint.folder / "model.gguf"
    export_gguf(checkpoint, path, "F32", kv_layout=layout)
    return path


@pytest.mark.parametrize("isa", _core.cpu_isas())
@pytest.mark.parametrize("name", ["int8", "int4", "auto"])
@pytest.mark.parametrize("changes", [QWEN2, {}], ids=["qwen2", "qwen3"])
def test_as_the_reference_rounds(changes: dict, name: str, isa: str, make: Callable[..., Checkpoint]) -> None:
    checkpoint = make(**changes)
    layout = calibrated() if name == "auto" else None
    session = Session.open(exported(checkpoint, layout), isa=isa, cache_type_k=name, cache_type_v=name)
    spec = layout or weights_layout(checkpoint, name)
    tokens = TOKENS[:90] if isa == "scalar" else TOKENS
    expected, exact = torch_logits(checkpoint, spec, tokens), torch_logits(checkpoint, None, tokens)
    found = session.logits(tokens)
    # Near a tie the two may round to either side, and what follows differs in turn.
    assert divergence(expected, found) < 0.1 * divergence(exact, found)
    assert session.engine.kv_bytes_per_token == spec.bytes_per_token(2, 64)
    assert session.engine.kv_recent_bytes == spec.recent_bytes(2, 64)


KINDS = [("auto", "auto"), ("int4", "int4"), ("int8", "f16"), ("f16", "int4")]


@pytest.mark.parametrize(("k", "v"), KINDS)
def test_parts_are_the_same_as_the_whole(k: str, v: str, make: Callable[..., Checkpoint]) -> None:
    """To the bit, whatever comes at a time, what was taken back before, and how many threads there are."""
    path = exported(make(**QWEN2), calibrated())
    expected = Session.open(path, cache_type_k=k, cache_type_v=v, n_threads=1).logits(TOKENS)
    session = Session.open(path, cache_type_k=k, cache_type_v=v, n_threads=3)
    rng = np.random.default_rng(7)
    for n in (40, *[1] * 30, *rng.integers(1, 34, 12), 260):
        past = session.n_past
        n = min(int(n), len(TOKENS) - past)
        np.testing.assert_array_equal(session.extend(TOKENS[past : past + n]), expected[past : past + n])
        rejected = int(rng.integers(0, min(n, RECENT + 1)))
        session.extend(TOKENS[: n - n // 2])  # a draft that is wrong
        session.truncate(past + n)
        session.truncate(past + n - rejected)
    for n in (300, 299, 250, 64, 21):
        rest = session.keep_shared(
            [*TOKENS[:n], 4000]
        )  # overwritten, within groups of tokens that share bytes
        assert len(rest) - 1 <= RECENT
        session.prefill(rest)
        session.truncate(n)
        np.testing.assert_array_equal(session.step(int(TOKENS[n])), expected[n])


def test_taken_back_further_it_still_reads_codes(make: Callable[..., Checkpoint]) -> None:
    path = exported(make(**QWEN2))
    session = Session.open(path, cache_type_k="int4", cache_type_v="int4")
    expected = session.logits(TOKENS)
    session.truncate(150)
    found = session.extend(TOKENS[150:200])
    assert 0 < divergence(expected[150:160], found[:10]) < 0.05


def test_drafts_leave_the_text_alone(make: Callable[..., Checkpoint]) -> None:
    path = exported(make(**QWEN2), calibrated())
    texts, rejected = [], 0
    for draft_max in (0, 8, 128):
        session = Session.open(path, cache_type_k="int4", cache_type_v="int4")
        session.draft_max = draft_max
        prompt = np.tile(TOKENS[:50], 3).tolist()
        texts.append(list(session.generate(prompt, 200, SamplingParams(temperature=5.0, top_k=2, seed=1))))
        rejected = max(rejected, session.timings.drafted - session.timings.accepted)
    assert texts[0] == texts[1] == texts[2]
    assert rejected > 20, session.timings


def test_a_stored_context_goes_on_exactly(make: Callable[..., Checkpoint], tmp_path: Path) -> None:
    path = exported(make(**QWEN2), calibrated())
    session = Session.open(path, cache_type_k="auto", cache_type_v="auto")
    expected = session.logits(TOKENS[:120])
    for n in (110, 64, 20):
        session.logits(TOKENS[:120])
        prompt_cache.save(session, tmp_path / "cache", n)
        other = Session.open(path, cache_type_k="auto", cache_type_v="auto")
        prompt_cache.load(other, tmp_path / "cache")
        rest = other.keep_shared(TOKENS[:n].tolist())
        assert len(rest) <= RECENT
        np.testing.assert_array_equal(other.prefill(rest), expected[n - 1])


@pytest.mark.parametrize("changes", [QWEN3_MOE, {"num_attention_heads": 2}], ids=["moe", "mha"])
def test_other_shapes(changes: dict, make: Callable[..., Checkpoint]) -> None:
    checkpoint = make(**changes)
    path = exported(checkpoint)
    exact = Session.open(path).logits(TOKENS[:80])
    for k, v in (("int8", "f16"), ("f16", "int8")):
        found = Session.open(path, cache_type_k=k, cache_type_v=v).logits(TOKENS[:80])
        assert 0 < divergence(exact, found) < 1e-3


def with_large_key_bias(checkpoint: Checkpoint, norm: float) -> Checkpoint:
    """The checkpoint with the key bias of every layer at this norm, and queries so small that attention stays soft."""
    infos = checkpoint.spec.tensors()
    values = {info.name: checkpoint.read(info.name) for info in infos}
    for name, value in values.items():
        if name.endswith("k_proj.bias"):
            values[name] = value * np.float32(norm / np.linalg.norm(value))
        elif ".q_proj." in name:
            values[name] = value * np.float32(0.3)
    planned = [Planned(info.name, "F32", info.shape) for info in infos]
    with SafetensorsWriter(checkpoint.folder / "model.safetensors", planned) as writer:
        for name, value in values.items():
            writer.write(name, value.astype(np.float32))
    return Checkpoint(checkpoint.folder)


def test_a_large_key_bias_costs_nothing(make: Callable[..., Checkpoint]) -> None:
    """Qwen2.5's bias has a norm of 900 in the last layer; stored with the keys it would drown them."""
    checkpoint = with_large_key_bias(make(**QWEN2), 900)
    exact = torch_logits(checkpoint, None)
    path = exported(checkpoint)
    for kind, most in (("int8", 1e-4), ("int4", 1e-2)):
        found = Session.open(path, cache_type_k=kind, cache_type_v="f16").logits(TOKENS)
        assert divergence(exact, found) < most
    naive = KVLayer(KVLayout(TokenGroups(4)), KVLayout(Half()))
    assert divergence(exact, torch_logits(checkpoint, KVCacheSpec("naive", (naive, naive)))) > 20 * most


def with_moved_scale(checkpoint: Checkpoint, factor: float) -> Checkpoint:
    """The same model, where some channels of keys are `factor` times as large and those of queries as small."""
    infos, dim = checkpoint.spec.tensors(), checkpoint.spec.head_dim
    factors = np.ones(dim, np.float32)
    factors[[3, 3 + dim // 2, 30, 30 + dim // 2]] = factor  # pairs, which RoPE turns into one another
    planned = [Planned(info.name, "F32", info.shape) for info in infos]
    values = {info.name: checkpoint.read(info.name).astype(np.float32) for info in infos}
    with SafetensorsWriter(checkpoint.folder / "model.safetensors", planned) as writer:
        for name, value in values.items():
            if "_proj" in name and ("q_proj" in name or "k_proj" in name):
                moved = np.tile(factors if "k_proj" in name else 1 / factors, len(value) // dim)
                value = value * moved.reshape(-1, *[1] * (value.ndim - 1))
            writer.write(name, value)
    return Checkpoint(checkpoint.folder)


def test_a_scale_that_keys_took_from_queries_costs_nothing(make: Callable[..., Checkpoint]) -> None:
    """The engine sees it in the weights, whatever their type, and balances it."""
    checkpoint = make(**QWEN2)
    plain = KVLayer(KVLayout(TokenGroups(4), hadamard=True), KVLayout(Half()))
    costs = []
    for factor in (1, 100):
        checkpoint = with_moved_scale(checkpoint, factor)
        exact = torch_logits(checkpoint, None)
        for kind in ("F32", "Q8_0"):
            path = checkpoint.folder / f"{kind}.gguf"
            export_gguf(checkpoint, path, kind)
            base = Session.open(path).logits(TOKENS)
            costs.append(
                divergence(base, Session.open(path, cache_type_k="int4", cache_type_v="f16").logits(TOKENS))
            )
    assert costs[2] < 2 * costs[0] + 1e-5
    assert costs[3] < 2 * costs[1] + 1e-5
    assert divergence(
        exact, torch_logits(checkpoint, KVCacheSpec("plain", (plain, plain), RECENT))
    ) > 10 * max(costs)


def test_options_that_cannot_be(
    make: Callable[..., Checkpoint], make_checkpoint: Callable[..., Path]
) -> None:
    path = exported(make())
    with pytest.raises(QwenQuantError, match=r"no calibrated layout .* --kv-cache auto"):
        Session.open(path, cache_type_k="auto")
    with pytest.raises(QwenQuantError, match="cache type of values 'q8_0' is not known; use f16, int8, int4"):
        Session.open(path, cache_type_v="q8_0")
    small = exported(make(head_dim=32))
    with pytest.raises(QwenQuantError, match=r"heads of 64, 128, .* not 32; use cache type f16"):
        Session.open(small, cache_type_k="int8")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("key_bits", [4], "key_bits': has 1 values where 2 belong"),
        ("value_bits", [4, 3], "value_bits': has other values than 4, 8 and 16"),
        ("key_centre", [1, 2], "key_centre': not an array of F32"),
        ("value_balance", [0.0] * 256, "not usable"),
    ],
)
def test_a_broken_layout_is_named(
    key: str, value: list, message: str, make: Callable, tmp_path: Path
) -> None:
    path = exported(make(), calibrated())
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "broken.gguf", "qwen3")
    for field in reader.fields.values():
        if field.name.startswith(("GGUF.", "general.architecture")):
            continue
        kind, inner = field.types[0], field.types[-1]
        content = value if field.name == f"qwen_quant.kv_cache.{key}" else field.contents()
        writer.add_key_value(field.name, content, kind, inner if len(field.types) > 1 else None) if (
            content is not value
        ) else writer.add_array(field.name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=message):
        Session.open(tmp_path / "broken.gguf", cache_type_k="int8", cache_type_v="int8")
