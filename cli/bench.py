"""`qwen-quant bench`: how fast a file runs here, and how fast it could."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_quant.cli import options

if TYPE_CHECKING:
    from qwen_quant.runtime.bench import BenchOptions, BenchRow

COLUMNS = ("threads", "depth", "prompt tok/s", "of int8", "tok/s", "of memory", "load s", "peak MB")
CHECKED_PROMPT = 8  # tokens that are read, and then generated, by fast and scalar kernels
CHECKED_TOKENS = 16


def command(
    model: options.Model,
    n_prompt: Annotated[int, typer.Option("--n-prompt", "-p", min=0, help="Tokens of the prompt.")] = 512,
    n_gen: Annotated[int, typer.Option("--n-gen", "-n", min=0, help="Tokens to generate.")] = 64,
    depths: Annotated[
        str, typer.Option("--n-depth", "-d", metavar="N,…", help="Tokens in the context before.")
    ] = "0",
    threads: Annotated[
        str | None,
        typer.Option("--threads", "-t", metavar="N,…", show_default="what is fastest", help="CPU threads."),
    ] = None,
    repeat: Annotated[int, typer.Option("--repetitions", "-r", min=1, help="How often to measure.")] = 5,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Compare generated tokens with those of the scalar kernels."),
    ] = True,
    isa: options.Isa = "auto",
    json: options.Json = False,
) -> None:
    """Measure speed and memory, beside the memory bandwidth and int8 rate of this machine.

    Medians over the repetitions. `load s` goes from opening the file to the first token. Ends with an error
    when the fast kernels' greedy text is not that of the scalar ones.
    """
    from qwen_quant.cli.run import find_file
    from qwen_quant.progress import progress
    from qwen_quant.runtime.bench import BenchOptions, bench

    wanted = BenchOptions(
        n_prompt, n_gen, numbers("-d", depths), numbers("-t", threads) if threads else (None,), repeat, isa
    )
    path = str(find_file(model))
    rows: list[BenchRow] = []
    with progress("measuring", len(wanted.threads) * len(wanted.depths)) as advance:
        for row in bench(path, wanted):
            rows.append(row)
            advance(1, f"{row.n_threads} threads at depth {row.n_depth}")
    checked = check_text(path, wanted) if check and not Path(path).is_dir() else {}
    if json:
        from qwen_quant.cli.output import print_json
        from qwen_quant.runtime.bench import summary

        print_json(conditions(path, wanted) | checked | summary(rows))
    else:
        show(rows, conditions(path, wanted))


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas. Raises UsageError for anything else."""
    from qwen_quant.errors import UsageError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: give numbers separated by commas, like 1,2") from None


def check_text(path: str, wanted: BenchOptions) -> dict[str, int]:
    """What there is to say about the comparison with the scalar kernels. Raises QwenQuantError when it fails."""
    from qwen_quant.runtime.agreement import check_greedy
    from qwen_quant.runtime.bench import BenchOptions, open_session, random_ids

    threads = max(wanted.threads, key=lambda n: n or 0)
    checked = BenchOptions(CHECKED_PROMPT, CHECKED_TOKENS, (CHECKED_PROMPT,), isa=wanted.isa)
    fast = open_session(path, checked, threads)
    scalar = open_session(path, checked, threads, isa="scalar")
    equal = check_greedy(fast, scalar, random_ids(fast, CHECKED_PROMPT), CHECKED_TOKENS)
    return {"checked_tokens": CHECKED_TOKENS, "equal_tokens": equal}


def conditions(path: str, wanted: BenchOptions) -> dict[str, Any]:
    """What was measured, and with which instructions."""
    from qwen_quant import _core

    return {
        "model": path,
        "n_prompt": wanted.n_prompt,
        "n_gen": wanted.n_gen,
        "repetitions": wanted.repeat,
        "isa": _core.cpu_isas()[-1] if wanted.isa == "auto" else wanted.isa,
        "int8_instructions": _core.int8_instructions(),
    }


def show(rows: Sequence[BenchRow], found: dict[str, Any]) -> None:
    """A table on a terminal, Markdown elsewhere."""
    from rich.console import Console
    from rich.table import Table

    lines = [cells(row) for row in rows]
    limits = rows[-1]
    title = f"{found['model']}: {found['n_prompt']} prompt tokens, {found['n_gen']} generated, {found['isa']}"
    caption = (
        f"memory {limits.median('bandwidth_gb_s'):.1f} GB/s, int8 {limits.median('int8_gop_s'):.0f} Gop/s "
        f"({found['int8_instructions']}, {limits.n_threads} threads)"
    )
    console = Console()
    if not console.is_terminal:
        table_lines = [f"| {' | '.join(line)} |" for line in (COLUMNS, ["---:"] * len(COLUMNS), *lines)]
        print(title, "", *table_lines, "", caption, sep="\n")
        return
    table = Table(title=title, caption=caption)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(*line)
    console.print(table)


def cells(row: BenchRow) -> list[str]:
    """A row as text."""

    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        str(row.n_threads),
        str(row.n_depth),
        text(row.median("pp_tok_s"), ".1f"),
        text(row.int8_fraction, ".0%"),
        text(row.median("tg_tok_s"), ".1f"),
        text(row.bandwidth_fraction, ".0%"),
        text(row.median("load_s"), ".2f"),
        f"{row.rss_mb:.0f}",
    ]
