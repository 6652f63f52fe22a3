"""`qwen-quant demo`: the whole road on the bundled model, ending in a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_quant.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from qwen_quant.checkpoint import Checkpoint

PROMPT = "It was a dark and stormy night, and the"
TEXT_TOKENS = 48
SPEED_TOKENS = 128


@dataclass(frozen=True)
class DemoOptions:
    """The command line of `demo`, parsed."""

    model: str
    keep: Path | None
    threads: int | None
    json: bool


@dataclass(frozen=True)
class Artifact:
    """Something made on the road: `path` is what is measured, `gguf` the same weights as a file that runs."""

    name: str
    path: str
    gguf: Path


@dataclass(frozen=True)
class Row:
    """A line of the final table; `kld_mean` in nats per token, `bytes` of the weight files."""

    format: str
    bytes: int
    ppl: float
    kld_mean: float
    top1_agreement: float
    tg_tok_s: float


def command(
    model: options.Model = "reference",
    keep: Annotated[
        Path | None,
        typer.Option("--keep", metavar="DIR", show_default=False, help="Leave the artifacts in this folder."),
    ] = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Quantize, export, run and measure the bundled model."""
    run(DemoOptions(model=model, keep=keep, threads=threads, json=json))


def run(options: DemoOptions) -> None:
    """Walk the road and print where it led."""
    import contextlib
    import tempfile
    import time

    from qwen_quant.checkpoint import Checkpoint

    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        artifacts = make_artifacts(Checkpoint.open(options.model), folder)
        rows = [measure(artifact, options) for artifact in artifacts]
        text = speak(artifacts[-1].gguf, options)
    seconds = time.monotonic() - began
    if options.json:
        from qwen_quant.cli.output import print_json

        print_json(
            {"rows": [asdict(row) for row in rows], "prompt": PROMPT, "text": text, "seconds": seconds}
        )
        return
    from rich.console import Console

    Console().print(table(rows))
    print(f"{artifacts[-1].name} says: {PROMPT}{' '.join(text.split(chr(10)))}")
    print(f"{seconds:.0f} s in all" + (f"; artifacts in {options.keep}" if options.keep else ""))


def make_artifacts(checkpoint: Checkpoint, folder: Path) -> list[Artifact]:
    """The checkpoint as BF16, GPTQ at 8 and 4 bits, Q4_0 and Q4_K_M, each also as the GGUF file that runs."""
    from qwen_quant.checkpoint import Checkpoint
    from qwen_quant.cli import calibrating
    from qwen_quant.exporters.gguf import TypeOptions, export_gguf, plan_file
    from qwen_quant.exporters.gptq import export_gptq
    from qwen_quant.grids.gptq import IntGrid
    from qwen_quant.quantize.recipe import Recipe, linear_grid

    recipe = Recipe()
    bf16 = folder / "bf16.gguf"
    export_gguf(checkpoint, bf16, "BF16")
    made = [Artifact("BF16", str(checkpoint.folder), bf16)]
    for bits in (8, 4):
        name, grid = f"int{bits} GPTQ", IntGrid(bits, 128)
        target, gguf = folder / f"gptq-int{bits}", folder / f"gptq-int{bits}.gguf"
        layers, record = calibrating.quantized_layers(checkpoint, linear_grid(grid), recipe)
        export_gptq(checkpoint, layers, target, grid, recipe, record, tied_head=False, overwrite=True)
        export_gguf(Checkpoint(target), gguf, record=record)
        made.append(Artifact(name, str(target), gguf))
    types = TypeOptions(calibrated=True)
    for file_type in ("Q4_0", "Q4_K_M"):
        gguf = folder / f"{file_type.lower()}.gguf"
        grids = plan_file(checkpoint, file_type, types).grids
        layers, record = calibrating.quantized_layers(checkpoint, grids, recipe)
        export_gguf(checkpoint, gguf, file_type, types, layers=layers, record=record)
        made.append(Artifact(f"{file_type} GGUF", str(gguf), gguf))
    return made


def measure(artifact: Artifact, options: DemoOptions) -> Row:
    """Bytes, perplexity and divergence of the artifact, and how fast its GGUF file generates."""
    from qwen_quant.evaluate.report import evaluate
    from qwen_quant.runtime.session import Session

    found = evaluate(artifact.path, options.model, n_threads=options.threads)
    path = Path(artifact.path)
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    session = Session.open(artifact.gguf, n_threads=options.threads)
    prompt = session.tokenizer.encode(PROMPT, special=False)
    for _ in session.generate(prompt, SPEED_TOKENS):
        pass
    return Row(
        artifact.name,
        sum(file.stat().st_size for file in files),
        found.ppl,
        found.kld_mean or 0.0,
        found.top1_agreement or 0.0,
        session.timings.tg_tok_s,
    )


def speak(gguf: Path, options: DemoOptions) -> str:
    """What the model makes of the prompt, greedily."""
    from qwen_quant.runtime.session import Session

    session = Session.open(gguf, n_threads=options.threads)
    tokenizer = session.tokenizer
    ids = session.generate(tokenizer.encode(PROMPT, special=False), TEXT_TOKENS, stop_ids=session.eos_ids)
    return tokenizer.decode(list(ids), skip_special=True)


def table(rows: list[Row]) -> Table:
    """The rows for a terminal."""
    from rich.table import Table

    result = Table(title="the bundled model, measured on held-out text")
    for name in ("format", "weights MB", "perplexity", "KLD to BF16", "top-1 agreement", "tok/s"):
        result.add_column(name, justify="left" if name == "format" else "right")
    for row in rows:
        result.add_row(
            row.format,
            f"{row.bytes / 1e6:.2f}",
            f"{row.ppl:.3f}",
            f"{row.kld_mean:.5f}",
            f"{100 * row.top1_agreement:.2f} %",
            f"{row.tg_tok_s:.0f}",
        )
    return result
