"""The command line: `qwen-quant COMMAND MODEL …`, also as `python -m qwen_quant.cli`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a failure told in one line, 2 for wrong usage."""
    from qwen_quant.cli.errors import guarded

    # Where torch's large tensors may lie in large pages, a layer on its way through GPTQ takes 150,000 page faults
    # instead of 440,000. torch reads it when it allocates for the first time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return guarded(list(sys.argv[1:] if arguments is None else arguments) or ["--help"])
