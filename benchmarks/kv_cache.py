"""What a cache of keys and values costs and gives: our engine's types beside llama.cpp's, on the same GGUF files.

    qwen-quant export MODEL --type F16 --kv-cache auto -o quality.gguf          # a trained model: quality
    python benchmarks/shapes.py qwen3-0.6b -o /tmp/shape                        # released shapes: speed
    qwen-quant export /tmp/shape --type Q4_0 --no-calibration -o speed.gguf
    python benchmarks/kv_cache.py --quality quality.gguf --speed speed.gguf --llama-bench PATH --llama-perplexity PATH

Quality: bytes per token (and those of recent tokens in FP16, whatever the context), KLD against the F16 cache of the
same file at each --ctx, perplexity, retrieval (share of tokens, nats gained). Speed: tok/s of single tokens at each
--depth, programs and types in turn, the median of --runs. llama.cpp's own tools are optional.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import perplexity

from qwen_quant.errors import QwenQuantError
from qwen_quant.evaluate.report import HELD_OUT, evaluate
from qwen_quant.runtime.session import Session

OURS = ("f16", "int8", "int4", "auto")
LLAMA_CPP = ("f16", "q8_0", "q4_0")
STEPS = 16  # tokens timed at a depth
PAGE = 256  # tokens of the engine's cache that lie together


def quality(options: argparse.Namespace, ctx: int) -> None:
    """A row for each of our types."""
    path = options.quality
    print(f"\n{path.name}, windows of {ctx}\ncache   bytes/token  recent      KLD  perplexity  retrieval")
    for kind in OURS:
        try:
            found = evaluate(
                *(path, path, options.data),
                ctx=ctx,
                max_windows=options.max_windows,
                n_threads=options.threads,
                kv_cache=kind,
                needle=options.needle,
            )
        except QwenQuantError as error:
            print(f"{kind:6}  {error}")
            continue
        gains = (found.retrieval_gain or {}).values()
        retrieval = [
            f"{share:.2f} {gain:+.2f}"
            for share, gain in zip((found.retrieval or {}).values(), gains, strict=True)
        ]
        size = f"{found.kv_bytes_per_token:11,.0f}  {found.kv_recent_bytes:6,}"
        print(
            f"{kind:6}  {size}  {found.kld_mean:.6f}  {found.ppl:10.4f}  {', '.join(retrieval)}", flush=True
        )


def llama_quality(options: argparse.Namespace, ctx: int) -> None:
    """KLD and perplexity of llama.cpp's types against its own F16 cache, by its perplexity tool."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "logits"
        common = [
            *(str(options.llama_perplexity), "-m", str(options.quality), "-f", str(options.data)),
            *("-c", str(ctx), "-b", str(ctx), "--chunks", str(options.max_windows or -1)),
            *("-t", str(options.threads), "--kl-divergence-base", str(base)),
        ]
        subprocess.run(common, check=True, capture_output=True)
        for kind in options.llama_types:
            text = perplexity.divergence([*common, "-ctk", kind, "-ctv", kind, "-fa", "on"])
            lines = [
                line for line in text.splitlines() if line.startswith((perplexity.SUMMARY, "Mean PPL(Q) "))
            ]
            print(f"llama.cpp {kind:5} {'; '.join(' '.join(line.split()) for line in lines)}", flush=True)


def step_rate(path: Path, kind: str, depth: int, threads: int) -> float:
    """Tokens per second of single steps after `depth` others."""
    session = Session.open(
        path, n_threads=threads, n_ctx=depth + 2 * STEPS, cache_type_k=kind, cache_type_v=kind
    )
    tokens = np.random.default_rng(0).integers(0, session.n_vocab, depth + STEPS).astype(np.int32)
    if depth:
        fill(session, tokens[:depth])
    session.step(int(tokens[depth]))
    began = time.perf_counter()
    for token in tokens[depth + 1 :]:
        session.step(int(token))
    return (STEPS - 1) / (time.perf_counter() - began)


def fill(session: Session, tokens: np.ndarray) -> None:
    """Makes `tokens`, a number of whole pages, the context. Only the first page is computed, the others are copies: how
    long a step takes does not depend on what they hold."""
    engine = session.native("this benchmark")
    session.prefill(tokens[:PAGE])
    parts = 2 * int(
        session.metadata[f"{engine.architecture}.attention.head_count_kv"]
    )  # heads of keys, of values
    copies, layers = len(tokens) // PAGE, []
    for layer in range(engine.n_layers):
        data = engine.read_kv(layer, PAGE)
        pages = int(engine.kv_bytes_per_token * PAGE) // engine.n_layers
        repeated = np.tile(data[:pages].reshape(parts, 1, -1), (1, copies, 1))
        layers.append(np.concatenate((repeated.ravel(), data[pages:])))
    session.restore(tokens.tolist(), layers)


def llama_rate(tool: Path, path: Path, kind: str, depth: int, threads: int) -> float:
    """The same by llama-bench."""
    command = [
        *(str(tool), "-m", str(path), "-p", "0", "-n", str(STEPS), "-d", str(depth), "-t", str(threads)),
        *("-ctk", kind, "-ctv", kind, "-fa", "1", "-r", "1", "-o", "json"),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)[-1]["avg_ts"])


def contenders(options: argparse.Namespace, depth: int) -> Iterator[tuple[str, float]]:
    """Every program and type once."""
    for kind in options.types:
        yield f"ours {kind}", step_rate(options.speed, kind, depth, options.threads)
    for kind in options.llama_types if options.llama_bench else ():
        yield (
            f"llama.cpp {kind}",
            llama_rate(options.llama_bench, options.speed, kind, depth, options.threads),
        )


def speed(options: argparse.Namespace) -> None:
    """Medians of alternating runs, a line for each contender and depth."""
    for depth in options.depth:
        rates: dict[str, list[float]] = {}
        for _ in range(options.runs):
            for name, rate in contenders(options, depth):
                rates.setdefault(name, []).append(rate)
        whole = statistics.median(rates["ours f16"]) if "ours f16" in rates else float("nan")
        print(
            f"\n{options.speed.name} at depth {depth:,}, {options.threads} threads\ncache            tok/s  of ours f16"
        )
        for name, found in rates.items():
            median = statistics.median(found)
            print(f"{name:15} {median:6.1f}  {median / whole:11.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quality", type=Path, help="a GGUF file of a trained model")
    add("--data", type=Path, default=HELD_OUT)
    add("--ctx", type=int, nargs="+", default=[512, 2048])
    add("--max-windows", type=int)
    add("--needle", action="store_true", help="measure retrieval too")
    add("--speed", type=Path, help="a GGUF file of a released shape")
    add("--types", nargs="+", default=["f16", "int8", "int4"], help="of ours, in which all layers are alike")
    add("--llama-types", nargs="*", default=LLAMA_CPP)
    add("--depth", type=int, nargs="+", default=[0, 4096, 16384])
    add("--runs", type=int, default=3)
    add("--threads", type=int, default=2)
    add("--llama-bench", type=Path, help="llama.cpp's llama-bench")
    add("--llama-perplexity", type=Path, help="llama.cpp's llama-perplexity")
    options = parser.parse_args()
    if options.quality:
        for ctx in options.ctx:
            quality(options, ctx)
            if options.llama_perplexity:
                llama_quality(options, ctx)
    if options.speed:
        speed(options)


if __name__ == "__main__":
    main()
