"""The commands under their names. Their files import only typer at first, so that --help answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from qwen_quant import __version__

HELP = """From a Qwen checkpoint to a 4-bit file that runs on a CPU, with the proof beside it.

MODEL is a folder or file, a Hugging Face id, or the word 'reference' for the small bundled model."""

COMMANDS = {  # and the modules that they stand in
    "gptq": "gptq",
    "export": "export",
    "kv": "kv",
    "run": "run",
    "bench": "bench",
    "eval": "evaluate",
    "demo": "demo",
}


def print_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        print(f"qwen-quant {__version__}")
        raise typer.Exit


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


def application(arguments: Sequence[str]) -> typer.Typer:
    """The application for a command line: the other commands are left out when one is named, because importing
    them and reading their options takes longer than a small model needs for a token."""
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    app = typer.Typer(
        name="qwen-quant",
        help=HELP,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(common)
    for name in [named] if named in COMMANDS else COMMANDS:
        app.command(name)(import_module(f"qwen_quant.cli.{COMMANDS[name]}").command)
    return app
