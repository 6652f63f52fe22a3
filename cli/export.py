"""`qwen-quant export`: a checkpoint, full precision or GPTQ, as a file that an engine runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen_quant.cli import calibrating, options
from qwen_quant.cli.calibrating import CalibrationOptions


@dataclass(frozen=True)
class ExportOptions(CalibrationOptions):
    """The command line of `export`, parsed; None lets the checkpoint decide."""

    model: str
    output: Path
    format: str
    type: str | None
    token_embedding_type: str | None
    output_tensor_type: str | None
    json: bool


def command(
    model: options.Model,
    output: options.Output,
    format: Annotated[str, typer.Option("--format", help="What to write: gguf.")] = "gguf",
    type: Annotated[
        str | None,
        typer.Option(
            "--type",
            show_default=False,
            help="F32, F16, BF16, Q8_0, Q4_0 or Q4_1; by default what a GPTQ checkpoint holds, else F16.",
        ),
    ] = None,
    token_embedding_type: Annotated[
        str | None,
        typer.Option("--token-embedding-type", show_default=False, help="Type of the token embedding alone."),
    ] = None,
    output_tensor_type: Annotated[
        str | None,
        typer.Option("--output-tensor-type", show_default=False, help="Type of an untied head alone."),
    ] = None,
    damp_percent: options.DampPercent = 0.01,
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
    json: options.Json = False,
) -> None:
    """Write a checkpoint as GGUF, by GPTQ where it is not quantized."""
    run(ExportOptions(**locals()))


def run(options: ExportOptions) -> None:
    """Quantize where needed, write, and report."""
    import time

    from qwen_quant.checkpoint import Checkpoint
    from qwen_quant.cli import planning
    from qwen_quant.errors import UsageError
    from qwen_quant.exporters.gguf import check_type, export_gguf, grid_choice, notes, stored_tensors
    from qwen_quant.grids.gguf import GRIDS, gguf_grid

    if options.format != "gguf":
        raise UsageError(f"--format {options.format}: not supported; choose gguf")
    began = time.monotonic()
    max_ram = planning.parse_ram(options.max_ram)
    checkpoint = Checkpoint.open(options.model)
    remarks = notes(checkpoint)
    if not options.json:
        calibrating.announce(remarks)
    file_type = options.type if options.type is None else check_type(options.type.upper())
    solving = checkpoint.quantization is None and file_type in GRIDS
    outer_types = (options.token_embedding_type, options.output_tensor_type)
    recipe = calibrating.recipe_of(options) if solving else None
    plan = planning.make_plan(
        checkpoint, stored_tensors(checkpoint, file_type, *outer_types), recipe, max_ram
    )
    if options.dry_run:
        planning.report(plan, options, gguf_grid(file_type) if file_type in GRIDS else None, recipe)
        return
    kv_layout = calibrating.kv_layout(checkpoint, options)
    with calibrating.layer_store(options.output, options.resume) as store:
        layers, record = None, None
        if recipe is not None and file_type is not None:
            layers, record = calibrating.quantized_layers(
                checkpoint, grid_choice(file_type), recipe, store, plan.keep_contexts
            )
        elif checkpoint.quantization is not None:
            record = _stored_record(checkpoint.quantization.raw)
        written = export_gguf(
            checkpoint,
            options.output,
            file_type,
            layers=layers,
            record=record,
            token_embedding_type=outer_types[0],
            output_tensor_type=outer_types[1],
            kv_layout=kv_layout,
        )
    seconds = time.monotonic() - began
    if options.json:
        from qwen_quant.cli.output import print_json

        fields = calibrating.result_fields(options.output, written, record, seconds)
        print_json({**fields, "types": written.types, "notes": remarks})
        return
    from rich.console import Console

    if written.layers and written.layers[0].reports:
        Console().print(calibrating.layer_table(written.layers))
    calibrating.print_notes(written.layers, written.unquantized)
    counts = Counter(written.types.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    print(f"{options.output}: {written.bytes / 1e6:.1f} MB, {seconds:.1f} s, tensors: {kinds}")


def _stored_record(quantization_config: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe in a GPTQ checkpoint of ours; what others wrote about theirs, as far as it has the same form."""
    meta = quantization_config.get("meta")
    record = meta.get("recipe") if isinstance(meta, dict) else None
    return record if isinstance(record, dict) else {}
