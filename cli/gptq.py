"""`qwen-quant gptq`: a checkpoint quantized by GPTQ, written as AutoGPTQ-format safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from qwen_quant.cli import calibrating, options
from qwen_quant.cli.calibrating import CalibrationOptions
from qwen_quant.cli.checking import check_of, memory, summary


@dataclass(frozen=True)
class GPTQOptions(CalibrationOptions):
    """The command line of `gptq`, parsed."""

    model: str
    output: Path
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    checkpoint_format: str
    max_shard_size: str
    tied_head: bool
    verify: bool
    overwrite: bool
    json: bool


def command(
    model: options.Model,
    output: options.Output,
    bits: Annotated[int, typer.Option("--bits", help="Bits per weight: 2, 3, 4 or 8.")] = 4,
    group_size: options.GroupSize = 128,
    sym: options.Sym = True,
    desc_act: Annotated[
        bool,
        typer.Option("--desc-act/--no-desc-act", help="Solve columns by falling activation; writes g_idx."),
    ] = False,
    damp_percent: options.DampPercent = 0.01,
    correct_targets: options.CorrectTargets = True,
    output_aware: options.OutputAware = False,
    dataset: options.Dataset = "builtin",
    num_samples: options.NumSamples = 128,
    seq_len: options.SeqLen = 512,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    no_calibration: options.NoCalibration = False,
    kv_cache: options.StoredKVCache = None,
    kv_bits_budget: options.KVBitsBudget = 4.8,
    resume: options.Resume = False,
    dry_run: options.DryRun = False,
    max_ram: options.MaxRam = None,
    checkpoint_format: Annotated[
        str, typer.Option("--checkpoint-format", help="How zero points are stored: gptq or gptq_v2.")
    ] = "gptq",
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Largest safetensors file, like 500MB or 4GB.")
    ] = "4GB",
    tied_head: Annotated[
        bool,
        typer.Option(
            "--tied-head/--no-tied-head",
            help="Store a tied output head a second time: auto-gptq needs it, others do not.",
        ),
    ] = True,
    verify: options.Verify = True,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Quantize a checkpoint with GPTQ, layer by layer."""
    run(GPTQOptions(**locals()))


def run(options: GPTQOptions) -> None:
    """Quantize, write, and report."""
    import time

    from qwen_quant.checkpoint import Checkpoint
    from qwen_quant.cli import planning
    from qwen_quant.exporters.gptq import export_gptq, notes, stored_tensors
    from qwen_quant.grids.gptq import IntGrid
    from qwen_quant.quantize.recipe import linear_grid

    began = time.monotonic()
    grid = IntGrid(options.bits, options.group_size, options.sym)
    recipe = calibrating.recipe_of(options, options.desc_act)
    limit = parse_size(options.max_shard_size)
    max_ram = planning.parse_ram(options.max_ram)
    checkpoint = Checkpoint.open(options.model)
    remarks = notes(checkpoint, grid) + calibrating.unknown_tensors(checkpoint)
    remarks += calibrating.plain_experts(checkpoint, options)
    if not options.json:
        calibrating.announce(remarks)
    stored = stored_tensors(checkpoint, grid, options.tied_head)
    after = memory(checkpoint, stored, "gptq") if options.verify else ()
    plan = planning.make_plan(checkpoint, stored, recipe, max_ram, after)
    if options.dry_run:
        planning.report(plan, options, lambda kind: grid, recipe)
        return
    kv_layout = calibrating.kv_layout(checkpoint, options)
    with calibrating.layer_store(options.output, options.resume) as store:
        layers, record = calibrating.quantized_layers(checkpoint, linear_grid(grid), recipe, store, plan)
        written = export_gptq(
            checkpoint,
            layers,
            options.output,
            grid,
            recipe,
            record,
            checkpoint_format=options.checkpoint_format,
            max_shard_bytes=limit,
            tied_head=options.tied_head,
            check=check_of(options.output, checkpoint, options.bits) if options.verify else None,
            overwrite=options.overwrite,
        )
    if kv_layout is not None:
        from qwen_quant.grids.kv_file import FILE_NAME, write_kv_file

        spec = checkpoint.spec
        write_kv_file(options.output / FILE_NAME, kv_layout, spec.num_key_value_heads, spec.head_dim, {})
    seconds = time.monotonic() - began
    if options.json:
        from qwen_quant.cli.output import print_json

        fields = calibrating.result_fields(checkpoint, options.output, written, record, seconds)
        print_json({**fields, "grid": grid.name, "notes": remarks, "check": written.check})
        return
    from rich.console import Console

    if recipe.calibrate:
        Console().print(calibrating.layer_table(written.layers))
    calibrating.print_notes(written.layers, written.unquantized)
    size = f"{written.bytes / 1e6:.1f} MB, {grid.name}"
    print(f"{options.output}: {size}, {seconds:.1f} s, peak {calibrating.peak_rss_mb():.0f} MB")
    if written.check:
        print(summary(written.check))


def parse_size(text: str) -> int:
    """Bytes of a size like 500MB or 4GB (powers of ten, as Hugging Face counts). Raises UsageError."""
    from qwen_quant.errors import UsageError

    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2].strip(), text[-2:].upper()
    if unit not in units or not number.isdigit() or int(number) == 0:
        raise UsageError(f"--max-shard-size {text}: must be a whole number with KB, MB or GB, like 4GB")
    return int(number) * units[unit]
