"""`--dry-run` and `--max-ram` of `gptq` and `export`: what a run would write and need."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qwen_quant.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from qwen_quant.checkpoint import Checkpoint
    from qwen_quant.cli.export import ExportOptions
    from qwen_quant.cli.gptq import GPTQOptions
    from qwen_quant.grids.base import AffineGrid
    from qwen_quant.quantize.plan import Plan
    from qwen_quant.quantize.plan_layer import Stage
    from qwen_quant.quantize.recipe import Recipe
    from qwen_quant.quantize.speed import Speed
    from qwen_quant.quantize.stored import StoredTensor

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_ram(text: str | None) -> int | None:
    """Bytes of a --max-ram. Raises UsageError."""
    return None if text is None else parse_size(text, "--max-ram")


def parse_size(text: str, option: str) -> int:
    """Bytes of a size like 8G, 1.5GB, 500M or 2GiB. Raises UsageError naming `option`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?B)?", text.strip().upper())
    if found is None or float(found[1]) == 0:
        raise UsageError(f"{option} {text}: must be a size like 8G, 1.5G or 500M")
    unit = UNITS[found[2]]
    if found[3] == "IB":
        unit = 1 << (10 * list(UNITS).index(found[2]))
    return int(float(found[1]) * unit)


def make_plan(
    checkpoint: Checkpoint,
    tensors: list[StoredTensor],
    recipe: Recipe | None,
    max_ram: int | None,
    beside: tuple[Stage, ...] = (),
    base: float | None = None,
) -> Plan:
    """The plan of a run, lowered to fit `max_ram` bytes where that changes nothing in the result; `beside` is what it
    does besides quantizing, `base` what the process held before, now by default. Many activations lie in files anyway.

    Raises ResourceError when it does not fit, CheckpointError or UsageError when the run would not begin.
    """
    from qwen_quant.quantize.plan import IN_MEMORY, can_spill, fit, plan_run
    from qwen_quant.quantize.speed import resident_bytes
    from qwen_quant.quantize.stream import pick_device, require_full_precision

    if recipe is not None and recipe.calibrate:
        require_full_precision(checkpoint)
        pick_device(recipe.device)
    base = resident_bytes() if base is None else base
    plan = plan_run(checkpoint.spec, tensors, recipe, base, beside=beside)
    if plan.set_aside > IN_MEMORY and can_spill(recipe):
        plan = plan_run(checkpoint.spec, tensors, recipe, base, beside=beside, spill=True)
    return plan if max_ram is None else fit(plan, checkpoint.spec, recipe, max_ram, str(checkpoint.folder))


def report(
    plan: Plan,
    options: GPTQOptions | ExportOptions,
    grid_of: Callable[[str], AffineGrid],
    recipe: Recipe | None,
    expected_kld: float | None = None,
) -> None:
    """Print the plan, as text or as JSON; the time comes from a short timing of this machine.

    `grid_of` is the grid that a quantized tensor's kind names, `expected_kld` what a budget's losses add up to.
    """
    from qwen_quant.quantize.speed import measure_speed
    from qwen_quant.quantize.stream import pick_device

    counts = Counter[str]()
    for tensor in plan.tensors:
        if tensor.quantized:
            counts[tensor.kind] += tensor.weights
    grids = {grid_of(kind): float(count) for kind, count in counts.items()}
    speed = measure_speed(grids, pick_device("cpu" if recipe is None else recipe.device))
    if options.json:
        from qwen_quant.cli.output import print_json

        record = None if recipe is None else recipe.record()
        found = {"dry_run": True, "output": str(options.output), **fields(plan, speed), "recipe": record}
        print_json(found if expected_kld is None else {**found, "expected_kld": expected_kld})
        return
    from rich.console import Console

    Console().print(table(plan))
    print_summary(plan, speed, options)
    if expected_kld is not None:
        print(f"divergence: about {expected_kld:.4f} nats, by the losses measured on the calibration text")


def fields(plan: Plan, speed: Speed) -> dict[str, Any]:
    """What --json prints of a plan; memory is that of the whole process."""
    by_layer: dict[int, list[StoredTensor]] = {}
    for tensor in plan.tensors:
        by_layer.setdefault(tensor.info.layer, []).append(tensor)
    layers = [
        {
            "layer": layer.layer,
            "tensors": [_tensor_fields(tensor) for tensor in by_layer[layer.layer]],
            "peak_rss_mb": plan.resident(layer.worst) / 1e6,
            "worst_stage": layer.worst.name,
            "seconds": sum(speed.seconds(layer.work).values()),
        }
        for layer in plan.layers
    ]
    parts = speed.seconds(plan.work)
    return {
        "bytes": plan.output_bytes,
        "types": types(plan),
        "outer_tensors": [_tensor_fields(tensor) for tensor in by_layer[-1]],
        "layers": layers,
        "peak_rss_mb": plan.peak / 1e6,
        "worst_stage": plan.worst.name,
        "hidden_states_mb": plan.hidden_states / 1e6,
        "keep_activations": plan.keep_activations,
        "spilled_mb": plan.set_aside * plan.spill / 1e6,
        "seconds": sum(parts.values()),
        "seconds_of": parts,
    }


def types(plan: Plan) -> dict[str, dict[str, int]]:
    """How many tensors have each type, and their bytes; the largest part first."""
    found: dict[str, dict[str, int]] = {}
    for tensor in plan.tensors:
        entry = found.setdefault(tensor.kind, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def _tensor_fields(tensor: StoredTensor) -> dict[str, Any]:
    return {
        "name": tensor.info.name,
        "shape": tensor.info.shape,
        "count": tensor.count,
        "stored_as": tensor.kind,
        "bits_per_weight": tensor.bits_per_weight,
        "bytes": tensor.nbytes,
    }


def table(plan: Plan) -> Table:
    """The tensors; layers that are stored alike are one block."""
    from rich.table import Table

    result = Table(title="what would be written")
    for name in ("layers", "tensor", "shape", "stored as", "bits per weight", "MB"):
        result.add_column(name, justify="left" if name in ("tensor", "stored as") else "right")
    blocks: dict[tuple[Any, ...], list[int]] = {}
    for number, group in groupby(plan.tensors, key=lambda tensor: tensor.info.layer):
        blocks.setdefault(tuple(_row(tensor) for tensor in group), []).append(number)
    for rows, layers in blocks.items():
        where = "" if layers[0] < 0 else str(layers[0])
        if len(layers) > 1:
            where = f"{len(layers)} × " if layers[-1] - layers[0] >= len(layers) else ""
            where += f"{layers[0]}–{layers[-1]}"
        for row in rows:
            result.add_row(where, *row)
            where = ""
        result.add_section()
    return result


def _row(tensor: StoredTensor) -> tuple[str, ...]:
    full = tensor.info.name
    name = (full.partition(f".{tensor.info.layer}.")[2] or full).removesuffix(".weight")
    shape = " × ".join(map(str, (*(() if tensor.count == 1 else (tensor.count,)), *tensor.info.shape)))
    return name, shape, tensor.kind, f"{tensor.bits_per_weight:.3f}", f"{tensor.nbytes / 1e6:.2f}"


def print_summary(plan: Plan, speed: Speed, options: GPTQOptions | ExportOptions) -> None:
    """Size, memory and time in a few lines."""
    from qwen_quant.quantize.plan import size

    seconds = [sum(speed.seconds(layer.work).values()) for layer in plan.layers]
    total = sum(speed.seconds(plan.work).values())
    print(f"{options.output}: would be {size(plan.output_bytes)}; nothing is written")
    parts = (f"{part['tensors']} {kind} ({size(part['bytes'])})" for kind, part in types(plan).items())
    print(f"types: {', '.join(parts)}")
    again = "" if plan.keep_activations else ", activations computed twice to fit --max-ram"
    kept = f", of which hidden states {size(plan.hidden_states)}" if plan.hidden_states else ""
    if plan.spill:
        kept = f", activations of {size(plan.set_aside)} in files beside the output"
    print(f"memory: about {size(plan.peak)} ({plan.worst.name}){kept}{again}")
    print(
        f"time: about {_duration(total)}, {max(seconds):.1f} s for a layer (an estimate for this machine while "
        "nothing else runs on it)"
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
