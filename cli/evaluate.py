"""`qwen-quant eval`: perplexity of an artifact, and its distance from the full-precision reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen_quant.cli import options


def command(
    model: options.Model,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            show_default=False,
            help="The model it was made from; without it only perplexity is measured.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", show_default=False, help="A UTF-8 text file; by default a bundled held-out text."
        ),
    ] = None,
    ctx: Annotated[int, typer.Option("--ctx", help="Tokens in a window; the second half is scored.")] = 512,
    max_windows: Annotated[
        int | None, typer.Option("--max-windows", show_default=False, help="Stop after this many windows.")
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            "--kv-cache",
            show_default=False,
            help="What MODEL's keys and values are stored as: f16, int8, int4 or auto; for a checkpoint folder also "
            "kivi4, qwen1 or a file of `qwen-quant kv`.",
        ),
    ] = None,
    needle: Annotated[
        bool, typer.Option("--needle", help="Also measure whether a passage is found again at depth.")
    ] = False,
    threads: options.Threads = None,
    isa: options.Isa = "auto",
    json: options.Json = False,
) -> None:
    """Measure perplexity, KL divergence and top-1 agreement."""
    from qwen_quant.evaluate.report import HELD_OUT, evaluate

    result = evaluate(
        model,
        reference,
        data or HELD_OUT,
        ctx=ctx,
        max_windows=max_windows,
        n_threads=threads,
        isa=isa,
        kv_cache=kv_cache,
        needle=needle,
    )
    if json:
        from qwen_quant.cli.output import print_json

        print_json(result.as_dict())
        return
    from rich.console import Console

    Console().print(result.table())
