"""The check that ends `gptq` and `export`: what was written, run against the checkpoint on held-out text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_quant.checkpoint import Checkpoint
    from qwen_quant.quantize.plan_layer import Stage
    from qwen_quant.quantize.stored import StoredTensor


def check_of(output: Path, checkpoint: Checkpoint, bits: int) -> Callable[[Path], dict[str, Any]]:
    """What runs an artifact of so many bits before it becomes `output`: its findings, none where it cannot run.

    A model that is larger than the memory that is free is written all the same: only its check is left out.
    """
    from qwen_quant.evaluate.selfcheck import runs, self_check

    def check(artifact: Path) -> dict[str, Any]:
        size, free = size_of(artifact), available_memory()
        if runs(artifact) and free is not None and size > free:
            print(
                f"note: {output} is not checked: it has {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are "
                "free to run it",
                file=sys.stderr,
            )
            return {}
        return self_check(artifact, checkpoint, bits, where=output)

    return check


def memory(
    checkpoint: Checkpoint, stored: list[StoredTensor], runtime: str, exact: bool = True
) -> tuple[Stage, ...]:
    """What the check of a file of `stored` tensors will need, with what runs it; `exact` where ONNX's integers are
    multiplied at accuracy_level 0."""
    from qwen_quant.evaluate.selfcheck import WINDOW
    from qwen_quant.evaluate.streamed import HEAD_ROWS
    from qwen_quant.quantize import plan_beside

    spec, nbytes = checkpoint.spec, sum(tensor.nbytes for tensor in stored)
    beside = plan_beside.judging(spec, WINDOW, HEAD_ROWS)
    running = {
        "onnx": plan_beside.in_onnxruntime(spec, stored, exact, beside),
        "gguf": plan_beside.ENGINE * nbytes + beside,
        "gptq": 2 * beside,
    }
    return (plan_beside.checking(spec, stored, running[runtime]),)


def size_of(artifact: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = artifact.rglob("*") if artifact.is_dir() else (artifact,)
    return sum(path.stat().st_size for path in files if path.is_file())


def available_memory() -> int | None:
    """Bytes that a process can get without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        [kilobytes] = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError):
        return None
    return int(kilobytes) << 10


def summary(check: dict[str, Any]) -> str:
    """The findings in a line."""
    greedy = ""
    if check.get("greedy_tokens"):
        same = round(check["greedy_agreement"] * check["greedy_tokens"])
        greedy = f", {same} of {check['greedy_tokens']} greedy tokens"
    return (
        f"checked on {check['tokens']} tokens: KLD {check['kld_mean']:.5f}, "
        f"top-1 agreement {100 * check['top1_agreement']:.2f} %{greedy}"
    )
