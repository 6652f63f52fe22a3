"""From exceptions to one line on standard error and an exit code."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TextIO

import typer

from qwen_quant.errors import QwenQuantError

PROGRAM = "qwen-quant"
DEBUG_VARIABLE = "QWEN_QUANT_DEBUG"
OPTIONAL_MODULES = ("torch", "gguf")  # of the extra [quantize]
INTERRUPTED = 130  # how typer's main reports Ctrl-C to a caller that handles errors itself


def guarded(arguments: Sequence[str]) -> int:
    """Run the application; an error becomes one line (with `--debug` after its traceback) and a code."""
    before_command = itertools.takewhile(lambda argument: argument.startswith("-"), arguments)
    debug = "--debug" in before_command or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
    prepare_process()
    try:
        return in_its_place(lambda: run_application(arguments))
    except BrokenPipeError:
        discard_output()
        return 1
    except SystemExit as leaving:  # typer's answer to a closed pipe
        return leaving.code if isinstance(leaving.code, int) else 1
    except BaseException as error:  # Ctrl-C too: nothing may end in a traceback
        if debug:
            traceback.print_exc()
        message, code = describe(error)
        print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
        return code


def in_its_place(run: Callable[[], int]) -> int:
    """`run`, or where torchrun started several processes: in the first one; the others help it to calibrate."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        return run()
    from qwen_quant.quantize.ranks import follow, leading

    if os.environ["RANK"] != "0":
        return follow()
    with leading():
        return run()


def run_application(arguments: Sequence[str]) -> int:
    """Parse and run; errors are left to the caller."""
    from qwen_quant.cli.app import application

    app = application(arguments)
    try:
        code = app(list(arguments), prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
    except typer.Abort:
        raise KeyboardInterrupt from None
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def prepare_process() -> None:
    """SIGTERM cleans up as Ctrl-C does, warnings are one line, and any text can be printed."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    warnings.showwarning = show_warning
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Callable[..., None] | None = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="replace")


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print what concerns the user; libraries' own notes on their use stay silent."""
    if issubclass(category, UserWarning) and category.__module__.startswith("qwen_quant"):
        print(f"{PROGRAM}: warning: {' '.join(str(message).split())}", file=file or sys.stderr)


def describe(error: BaseException) -> tuple[str, int]:
    """The message of `error` and the exit code it stands for."""
    if isinstance(error, QwenQuantError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 1
    if is_usage_error(error):
        return describe_usage(error), 2
    if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL_MODULES:
        return (
            f"this command needs {error.name}, which is not installed; pip install 'qwen-quant[quantize]'",
            1,
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "out of memory; close other programs, or choose a smaller model or fewer samples", 1
    if isinstance(error, OSError):
        return describe_os_error(error), 1
    detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"unexpected {detail} (a bug: {DEBUG_VARIABLE}=1 shows where)", 1


def describe_os_error(error: OSError) -> str:
    reason = error.strerror or str(error)
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{where}{reason}; free some space or choose another place with -o"
    return f"{where}{reason}"


def is_usage_error(error: BaseException) -> bool:
    """Whether typer (or click, on which older ones rest) refused the command line."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def describe_usage(error: BaseException) -> str:
    message = str(error.format_message()).rstrip(".")  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    return f"{message}; see {context.command_path if context else PROGRAM} --help"


def discard_output() -> None:
    """The reader of our output has gone: point it nowhere, so that the flush at exit does not fail again."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)
