"""What `export` says when a file or folder is written, whatever its format."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

from qwen_quant.cli import calibrating
from qwen_quant.cli.checking import summary

if TYPE_CHECKING:
    from qwen_quant.checkpoint import Checkpoint
    from qwen_quant.cli.export import ExportOptions


class Written(calibrating.Written, Protocol):
    """What the exporters of this command return."""

    check: dict[str, Any]


def report(
    checkpoint: Checkpoint,
    options: ExportOptions,
    written: Written,
    record: dict[str, Any] | None,
    remarks: list[str],
    began: float,
) -> None:
    """Print it, as text or as JSON; `began` is when the command started, on the monotonic clock."""
    seconds = time.monotonic() - began
    if options.json:
        from qwen_quant.cli.output import print_json

        fields = calibrating.result_fields(checkpoint, options.output, written, record, seconds)
        print_json({**fields, "notes": remarks, "check": written.check})
        return
    from rich.console import Console

    if written.layers and written.layers[0].reports:
        Console().print(calibrating.layer_table(written.layers))
    calibrating.print_notes(written.layers, written.unquantized)
    counts = Counter(written.types.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    print(f"{options.output}: {written.bytes / 1e6:.1f} MB, {seconds:.1f} s, tensors: {kinds}")
    if written.check:
        print(summary(written.check))
