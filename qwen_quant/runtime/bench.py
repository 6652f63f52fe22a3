"""Speed of a file on this machine, beside what the machine can do at most."""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen_quant import _core
from qwen_quant.errors import UsageError
from qwen_quant.runtime.gguf import GGUFFile
from qwen_quant.runtime.session import Session
from qwen_quant.runtime.work import Work, work_per_token

MEASURED = ("pp_tok_s", "tg_tok_s", "load_s", "bandwidth_gb_s", "int8_gop_s")
PROBE_BYTES = 256 << 20  # at least; and several times the last cache


@dataclass(frozen=True)
class BenchOptions:
    """What is measured: a prompt of `n_prompt` tokens and `n_gen` steps, after each of `depths` tokens, with
    each of `threads` (None: the engine's choice), `repeat` times.

    Raises UsageError for numbers that make no sense.
    """

    n_prompt: int = 512
    n_gen: int = 64
    depths: tuple[int, ...] = (0,)
    threads: tuple[int | None, ...] = (None,)
    repeat: int = 5
    isa: str = "auto"

    def __post_init__(self) -> None:
        if min(self.n_prompt, self.n_gen) < 0 or max(self.n_prompt, self.n_gen) == 0:
            raise UsageError("give the tokens of a prompt (-p) or to generate (-n), or both")
        if not self.depths or min(self.depths) < 0:
            raise UsageError("a depth is a number of tokens, 0 or more")
        if not self.threads or any(n is not None and n < 1 for n in self.threads):
            raise UsageError("a number of threads is 1 or more")
        if self.repeat < 1:
            raise UsageError("measure at least once")

    @property
    def n_ctx(self) -> int:
        """Tokens of context that all of it needs."""
        return max(self.depths) + max(self.n_prompt, self.n_gen, 1)


@dataclass
class BenchRow:
    """Measurements at one depth with one number of threads, one entry for each repetition.

    Tokens per second of prompt and generation, seconds from opening the file to the first token's logits,
    GB/s and 10⁹ int8 operations/s that the machine can do, and the process's peak memory in MB.
    """

    n_threads: int
    n_depth: int
    work: Work | None  # unknown for other files than GGUF
    kv_bytes_per_token: float
    n_gen: int
    load_s: list[float]
    pp_tok_s: list[float] = field(default_factory=list)
    tg_tok_s: list[float] = field(default_factory=list)
    bandwidth_gb_s: list[float] = field(default_factory=list)
    int8_gop_s: list[float] = field(default_factory=list)
    rss_mb: float = 0.0

    def median(self, name: str) -> float | None:
        """Of the measurements of that name; None where nothing was measured."""
        values = getattr(self, name)
        return statistics.median(values) if values else None

    @property
    def bandwidth_fraction(self) -> float | None:
        """Bytes of weights and cache that decoding reads per second, of those that the machine can read."""
        speed, limit = self.median("tg_tok_s"), self.median("bandwidth_gb_s")
        if speed is None or limit is None or self.work is None:
            return None
        cached = self.kv_bytes_per_token * (self.n_depth + (self.n_gen + 1) / 2)  # on average over the steps
        return speed * (self.work.weight_bytes + cached) / 1e9 / limit

    @property
    def int8_fraction(self) -> float | None:
        """Operations of the linear layers per second in a prompt, of those that the machine can do."""
        speed, limit = self.median("pp_tok_s"), self.median("int8_gop_s")
        if speed is None or limit is None or self.work is None:
            return None
        return speed * self.work.operations / 1e9 / limit

    def as_dict(self) -> dict[str, Any]:
        """Medians, with `_min` and `_max` beside them."""
        found: dict[str, Any] = {"n_threads": self.n_threads, "n_depth": self.n_depth}
        for name in MEASURED:
            values = getattr(self, name)
            found[name] = self.median(name)
            found[f"{name}_min"] = min(values, default=None)
            found[f"{name}_max"] = max(values, default=None)
        found["rss_mb"] = self.rss_mb
        found["bandwidth_fraction"] = self.bandwidth_fraction
        found["int8_fraction"] = self.int8_fraction
        return found


def bench(path: str | os.PathLike[str], options: BenchOptions) -> Iterator[BenchRow]:
    """A row for each number of threads and each depth, as it is measured. Raises as `Session.open` does."""
    for n_threads in options.threads:
        yield from _bench_threads(path, options, n_threads)


def _bench_threads(
    path: str | os.PathLike[str], options: BenchOptions, n_threads: int | None
) -> Iterator[BenchRow]:
    peak = PeakMemory()
    load_s: list[float] = []
    session: Session | None = None
    while session is None or len(load_s) < options.repeat:
        session = None  # frees the one before
        start = time.perf_counter()
        session = open_session(path, options, n_threads)
        session.step(0)
        load_s.append(time.perf_counter() - start)
    native = session.engine if isinstance(session.engine, _core.Engine) else None
    n = native.n_threads if native else n_threads or os.cpu_count() or 1
    loading = peak.read()
    probe = _core.MemoryProbe(n, probe_bytes())
    work = work_per_token(session.file) if isinstance(session.file, GGUFFile) else None
    kv_bytes = native.kv_bytes_per_token if native else 0.0
    for depth in options.depths:
        row = BenchRow(n, depth, work, kv_bytes, options.n_gen, load_s)
        peak = PeakMemory()
        _fill(session, depth)
        for repetition in range(-1, options.repeat):  # the first is for warming up
            pp = _speed(session, depth, options.n_prompt, _prefill)
            tg = _speed(session, depth, options.n_gen, _steps)
            if repetition < 0:
                continue
            row.pp_tok_s += pp
            row.tg_tok_s += tg
            row.bandwidth_gb_s.append(probe.read() / 1e9)
            row.int8_gop_s.append(_core.int8_rate(n) / 1e9)
        row.rss_mb = max(loading, peak.read() - probe.n_bytes) / 1e6
        yield row


def open_session(
    path: str | os.PathLike[str], options: BenchOptions, n_threads: int | None, isa: str | None = None
) -> Session:
    """The file with as much context as the measurements need, though it may be more than it was made for."""
    return Session.open(path, n_threads=n_threads, isa=isa or options.isa, n_ctx=options.n_ctx)


def random_ids(session: Session, count: int) -> list[int]:
    """Token ids, the same each time: text would take a model with experts through fewer of them."""
    return np.random.default_rng(count).integers(0, session.n_vocab, count).tolist()


def _fill(session: Session, depth: int) -> None:
    session.reset()
    if depth:
        session.prefill(random_ids(session, depth))


def _prefill(session: Session, ids: list[int]) -> None:
    session.prefill(ids)


def _steps(session: Session, ids: list[int]) -> None:
    for token in ids:
        session.step(token)


def _speed(
    session: Session, depth: int, count: int, run: Callable[[Session, list[int]], None]
) -> list[float]:
    """Tokens per second of `run` on `count` tokens after the first `depth` of the context; none for no tokens."""
    if not count:
        return []
    session.truncate(depth)
    ids = random_ids(session, count)
    start = time.perf_counter()
    run(session, ids)
    return [count / (time.perf_counter() - start)]


def probe_bytes() -> int:
    """Memory that is much larger than the caches."""
    try:
        last_cache = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):
        last_cache = 0
    return max(PROBE_BYTES, 8 * last_cache)


class PeakMemory:
    """The process's peak resident memory since this object was made; where the system cannot say that, ever."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        """Bytes."""
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def summary(rows: Sequence[BenchRow]) -> dict[str, Any]:
    """The rows' fields: as they are for one row, as lists for several."""
    found = [row.as_dict() for row in rows]
    return found[0] if len(found) == 1 else {key: [row[key] for row in found] for key in found[0]}
