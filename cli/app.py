"""The commands under their names. Their files import only typer at first, so that --help answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from qwen_quant import __version__
from qwen_quant.cli import bench, demo, evaluate, export, gptq, kv, run

HELP = """From a Qwen checkpoint to a 4-bit file that runs on a CPU, with the proof beside it.

MODEL is a folder or file, a Hugging Face id, or the word 'reference' for the small bundled model."""

app = typer.Typer(
    name="qwen-quant",
    help=HELP,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("gptq")(gptq.command)
app.command("export")(export.command)
app.command("kv")(kv.command)
app.command("run")(run.command)
app.command("bench")(bench.command)
app.command("eval")(evaluate.command)
app.command("demo")(demo.command)


def print_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        print(f"qwen-quant {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (also QWEN_QUANT_DEBUG=1).")
    ] = False,
) -> None:
    """Options that stand before the command; `--debug` is read where errors are caught."""
