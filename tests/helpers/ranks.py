"""Commands in several processes as torchrun starts them, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen_quant.cli import main
from qwen_quant.errors import CalibrationError
from qwen_quant.quantize import calibration, experts, gptq, inputs, layer_run, layer_weights

# What takes long to import, for all processes at once.
IMPORTED = [
    "qwen_quant.cli.gptq",
    "qwen_quant.cli.export",
    "qwen_quant.exporters.gguf_budget",
    "qwen_quant.quantize.sensitivity",
]
# So small that a tiny model makes many pieces of each kind.
PIECES = {
    (inputs, "TOKENS_AT_ONCE"): 256,
    (inputs, "ROUTED_AT_ONCE"): 256,
    (calibration, "BLOCK"): 32,
    (gptq, "ROWS_AT_ONCE"): 96,
    (experts, "FLOATS_AT_ONCE"): 1 << 15,
}


def fail(*_: object, **__: object) -> None:
    raise CalibrationError("the second one failed")


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# What can go wrong: in a piece of work, between pieces, and without a word.
SABOTAGE: dict[str, tuple[object, str, Callable[..., None]]] = {
    "in a piece": (layer_run.LayerRun, "_context", fail),
    "between pieces": (layer_weights, "load_layer", fail),
    "killed": (layer_weights, "load_layer", die),
}


@dataclass
class Rank:
    """A process and what it left behind."""

    process: multiprocessing.process.BaseProcess
    folder: Path

    def end(self) -> tuple[int | None, str, str]:
        """Exit code, standard output and standard error; None for one that hangs."""
        self.process.join(120)
        code = self.process.exitcode
        self.process.kill()
        return code, *((self.folder / name).read_text() for name in ("out", "err"))  # type: ignore[return-value]


def start(count: int, arguments: list[str], folder: Path, sabotage: str = "") -> list[Rank]:
    """`count` processes that run one command; the second one is sabotaged. Their output goes to `folder`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for number in range(count):
        mine = folder / f"rank{number}"
        mine.mkdir(parents=True)
        environment = {key: str(value) for key, value in {**place, "RANK": number}.items()}
        broken = sabotage if number == 1 else ""
        task = (arguments, environment, torch.get_num_threads(), mine, broken)
        ranks.append(Rank(context.Process(target=run, args=task), mine))
        ranks[-1].process.start()
    return ranks


def run(arguments: list[str], environment: dict[str, str], threads: int, folder: Path, sabotage: str) -> None:
    """In the new process: the command."""
    os.environ |= environment
    torch.set_num_threads(threads)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    for (module, name), value in PIECES.items():
        setattr(module, name, value)
    if sabotage:
        where, name, instead = SABOTAGE[sabotage]
        setattr(where, name, instead)
    code = main(arguments)
    sys.stdout.flush()
    sys.exit(code)
