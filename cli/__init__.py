"""The command line: `qwen-quant COMMAND MODEL …`, also as `python -m qwen_quant.cli`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a failure told in one line, 2 for wrong usage."""
    from qwen_quant.cli.errors import guarded

    return guarded(list(sys.argv[1:] if arguments is None else arguments) or ["--help"])
