"""What bench counts, against a hand's count over the file, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qwen_quant import _core
from qwen_quant.errors import QwenQuantError, UsageError
from qwen_quant.runtime.agreement import check_greedy
from qwen_quant.runtime.bench import BenchOptions, BenchRow, bench
from qwen_quant.runtime.gguf import GGUFFile
from qwen_quant.runtime.session import Session
from qwen_quant.runtime.work import Work, work_per_token

TinyModels = Callable[..., Any]


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_quant.runtime.bench.probe_bytes", lambda: 1 << 20)


@pytest.mark.parametrize(
    ("architecture", "tied"), [("qwen3", True), ("qwen3", False), ("qwen2moe", False), ("qwen3moe", True)]
)
def test_work_is_that_of_the_weights_a_token_meets(
    tiny_model: TinyModels, architecture: str, tied: bool
) -> None:
    path = tiny_model(architecture, "Q8_0", tied=tied).path
    n_bytes = operations = 0
    for tensor in gguf.GGUFReader(path).tensors:
        times = 3 / 8 if tensor.name.endswith("_exps.weight") else 1.0  # 3 of 8 experts
        if tensor.name == "token_embd.weight" and not tied:
            continue
        n_bytes += tensor.n_bytes * times
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            operations += 2 * tensor.n_elements * times
    assert work_per_token(GGUFFile(path)) == Work(round(n_bytes), round(operations))


def test_fractions() -> None:
    row = BenchRow(2, 100, Work(1_000_000, 5_000_000), 1000, 9, [0.5])
    row.pp_tok_s, row.tg_tok_s = [100.0, 400.0, 200.0], [10.0, 30.0, 20.0]
    row.bandwidth_gb_s, row.int8_gop_s = [0.05, 0.04, 0.02], [2.0, 3.0, 1.0]
    # Nine steps see 101 to 109 positions, 105 on average.
    assert row.bandwidth_fraction == pytest.approx(20 * (1_000_000 + 105 * 1000) / 0.04e9)
    assert row.int8_fraction == pytest.approx(200 * 5_000_000 / 2e9)
    found = row.as_dict()
    assert (found["pp_tok_s"], found["pp_tok_s_min"], found["pp_tok_s_max"]) == (200.0, 100.0, 400.0)


def test_every_combination_is_measured(tiny_model: TinyModels) -> None:
    options = BenchOptions(16, 4, depths=(0, 40), threads=(1, 2), repeat=2)
    rows = list(bench(tiny_model("qwen3", "Q4_0").path, options))
    assert [(row.n_threads, row.n_depth) for row in rows] == [(1, 0), (1, 40), (2, 0), (2, 40)]
    for row in rows:
        measured = (row.pp_tok_s, row.tg_tok_s, row.load_s, row.bandwidth_gb_s, row.int8_gop_s)
        assert all(len(values) == 2 and min(values) > 0 for values in measured)
        # Two layers with keys and values of two heads of 32 in FP16.
        assert row.kv_bytes_per_token == 2 * 2 * 2 * 32 * 2
        assert 0 < row.rss_mb < 4000


def test_only_a_prompt(tiny_model: TinyModels) -> None:
    (row,) = bench(tiny_model("qwen2", "Q4_0").path, BenchOptions(16, 0, repeat=1))
    assert row.median("tg_tok_s") is None
    assert row.bandwidth_fraction is None
    assert row.int8_fraction is not None


@pytest.mark.parametrize(
    "wrong",
    [{"n_prompt": 0, "n_gen": 0}, {"depths": (-1,)}, {"depths": ()}, {"threads": (0,)}, {"repeat": 0}],
)
def test_numbers_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        BenchOptions(**wrong)


@pytest.mark.parametrize("isa", _core.cpu_isas())
@pytest.mark.parametrize("tensor_type", ["F16", "Q8_0", "Q4_0"])
def test_kernels_agree_with_the_scalar_ones(tiny_model: TinyModels, tensor_type: str, isa: str) -> None:
    path = tiny_model("qwen3", tensor_type).path
    fast, scalar = Session.open(path, isa=isa), Session.open(path, isa="scalar")
    assert check_greedy(fast, scalar, [5, 6, 7, 8], 16) >= 14


def test_kernels_that_compute_something_else_are_found(tiny_model: TinyModels) -> None:
    """Another model stands for broken kernels."""
    fast = Session.open(tiny_model("qwen3", "Q8_0").path)
    other = Session.open(tiny_model("qwen3", "Q8_0", tied=False).path, isa="scalar")
    with pytest.raises(QwenQuantError, match=r"kernels generate token \d+ at place \d+, the scalar ones"):
        check_greedy(fast, other, [5, 6, 7, 8], 8)


def test_kernels_that_are_a_little_wrong_are_found(tiny_model: TinyModels, tmp_path: Path) -> None:
    """As if one block of each row of a matrix were multiplied with a scale that is 30 % too large."""
    path = tiny_model("qwen3", "Q8_0").path
    tensor = GGUFFile(path).tensors["blk.0.ffn_down.weight"]
    data = np.fromfile(path, np.uint8)
    rows = data[tensor.offset : tensor.offset + tensor.nbytes].reshape(tensor.shape[0], -1)
    scales = rows[:, :2].copy().view(np.float16)
    rows[:, :2] = (scales * np.float16(1.3)).view(np.uint8)
    data.tofile(tmp_path / "wrong.gguf")
    with pytest.raises(QwenQuantError, match=r"kernels (generate|and the scalar ones differ by 0\.)"):
        check_greedy(Session.open(tmp_path / "wrong.gguf"), Session.open(path, isa="scalar"), [5, 6, 7, 8], 8)


PEAKS = """
import numpy as np
from qwen_quant.runtime.bench import PeakMemory
peak = PeakMemory()
before = peak.read()
np.ones(64 << 20, np.uint8).sum()
print(before, peak.read())
"""


def test_peak_memory_sees_what_was_freed() -> None:
    """In a process of its own: where the system cannot forget a peak, earlier tests' would hide this one's."""
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], capture_output=True, text=True, timeout=120, check=True
    )
    before, after = map(int, done.stdout.split())
    assert after - before > 48 << 20


def test_probes_measure_something() -> None:
    probe = _core.MemoryProbe(2, 1 << 20)
    assert probe.n_bytes == 1 << 20
    assert 1e5 < probe.read() < 1e13
    assert 1e5 < _core.int8_rate(1) < 1e14
    assert _core.int8_instructions()
    for n_threads in (0, -1, 5000):
        with pytest.raises(QwenQuantError, match="n_threads"):
            _core.int8_rate(n_threads)


def test_default_threads_are_found_once() -> None:
    assert _core.fastest_thread_count(1) == 1
    chosen = _core.fastest_thread_count(2)
    assert chosen in (1, 2)
    start = time.process_time()
    assert [_core.fastest_thread_count(2) for _ in range(100)] == [chosen] * 100
    assert time.process_time() - start < 0.1


def test_the_default_is_what_was_found(tiny_model: TinyModels) -> None:
    engine = Session.open(tiny_model("qwen3", "Q4_0").path).engine
    assert engine.n_threads == _core.fastest_thread_count(len(os.sched_getaffinity(0)))
