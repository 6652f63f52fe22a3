"""llama.cpp's llama-perplexity, of which two benchmarks read the divergence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ATTEMPTS = 5  # now and then it ends without the summary that it computed
SUMMARY = "Mean    KLD"


def divergence(command: Sequence[str | Path]) -> str:
    """What `command`, a llama-perplexity with a base to compare with, prints. Exits where it fails or says nothing."""
    for _ in range(ATTEMPTS):
        done = subprocess.run(
            [*map(str, command), "--kl-divergence"], capture_output=True, text=True, errors="replace"
        )
        text = done.stdout + done.stderr
        if done.returncode:
            sys.exit(f"{text[-3000:]}\n{command[0]} failed")
        if SUMMARY in text:
            return text
    sys.exit(f"{text[-2000:]}\n{command[0]} printed no mean KLD")
