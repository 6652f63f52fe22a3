"""`qwen-quant export`: a checkpoint, full precision or GPTQ, as a file that an engine runs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from qwen_quant.cli import calibrating, export_onnx, options
from qwen_quant.cli.calibrating import CalibrationOptions
from qwen_quant.cli.checking import check_of, memory
from qwen_quant.cli.exported import report


@dataclass(frozen=True)
class ExportOptions(CalibrationOptions):
    """The command line of `export`, parsed; None lets the checkpoint decide."""

    model: str
    output: Path
    format: str
    type: str | None
    token_embedding_type: str | None
    output_tensor_type: str | None
    tensor_type: list[str] | None
    pure: bool
    group_size: int
    sym: bool
    accuracy_level: str
    opset: int | None
    verify: bool
    overwrite: bool
    target_bpw: float | None
    target_size: str | None
    json: bool


def command(
    model: options.Model,
    output: options.Output,
    format: Annotated[str, typer.Option("--format", help="What to write: gguf or onnx.")] = "gguf",
    type: Annotated[
        str | None,
        typer.Option(
            "--type",
            show_default=False,
            help="As llama-quantize names it, like Q4_K_M (gguf), or F32, F16, BF16, int8, int4 (onnx); by default "
            "what a GPTQ checkpoint holds, else F16.",
        ),
    ] = None,
    token_embedding_type: Annotated[
        str | None,
        typer.Option("--token-embedding-type", show_default=False, help="Type of the token embedding alone."),
    ] = None,
    output_tensor_type: Annotated[
        str | None,
        typer.Option("--output-tensor-type", show_default=False, help="Type of the head alone."),
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type",
            metavar="NAME=TYPE",
            show_default=False,
            help="Type of the tensors whose GGUF names match a regular expression, like ffn_down=Q6_K; repeatable.",
        ),
    ] = None,
    pure: Annotated[
        bool, typer.Option("--pure", help="Every matrix of the type itself, without llama.cpp's mix.")
    ] = False,
    group_size: options.GroupSize = 128,
    sym: options.Sym = True,
    accuracy_level: Annotated[
        str,
        typer.Option(
            "--accuracy-level",
            help="ONNX: products with FP32 activations (0), int8 ones (4), or chosen for each by its error (auto).",
        ),
    ] = "auto",
    opset: Annotated[
        int | None,
        typer.Option(
            "--opset",
            show_default=False,
            help="ONNX: standard operators of this opset (23) only; by default onnxruntime's fused ones.",
        ),
    ] = None,
    verify: options.Verify = True,
    overwrite: options.Overwrite = False,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            "--target-bpw",
            metavar="BITS",
            show_default=False,
            help="Choose each tensor's type by measured loss, for this many bits per weight on average.",
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            "--target-size",
            metavar="SIZE",
            show_default=False,
            help="The same for a file of this size, like 2.3G.",
        ),
    ] = None,
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
    json: options.Json = False,
) -> None:
    """Write a checkpoint as GGUF or ONNX, by GPTQ where it is not quantized."""
    run(ExportOptions(**locals()))


# Options that only one format knows, as they are spelled.
ONLY = {
    "gguf": {
        "tensor_type": "--tensor-type",
        "pure": "--pure",
        "target_bpw": "--target-bpw",
        "target_size": "--target-size",
        "kv_bits_budget": "--kv-bits-budget",
    },
    "onnx": {
        "group_size": "--group-size",
        "sym": "--asym",
        "accuracy_level": "--accuracy-level",
        "opset": "--opset",
    },
}


def check_format(options: ExportOptions) -> None:
    """Raise UsageError for an unknown --format, and for options that mean nothing to it."""
    from qwen_quant.errors import UsageError

    if options.format not in ONLY:
        raise UsageError(f"--format {options.format}: not supported; choose {' or '.join(ONLY)}")
    defaults = inspect.signature(command).parameters
    for other in ONLY.keys() - {options.format}:
        for name, spelled in ONLY[other].items():
            if getattr(options, name) != defaults[name].default:
                raise UsageError(f"{spelled}: belongs to --format {other}; drop it or choose that format")


def run(options: ExportOptions) -> None:
    """Quantize where needed, write, and report."""
    import time

    from qwen_quant.checkpoint import Checkpoint
    from qwen_quant.cli import budget, planning
    from qwen_quant.exporters.gguf import TypeOptions, export_gguf, notes, plan_file
    from qwen_quant.grids.gguf import gguf_grid

    check_format(options)
    if options.format == "onnx":
        export_onnx.run(options)
        return
    began = time.monotonic()
    max_ram = planning.parse_ram(options.max_ram)
    checkpoint = Checkpoint.open(options.model)
    remarks = notes(checkpoint) + calibrating.unknown_tensors(checkpoint)
    remarks += calibrating.plain_experts(checkpoint, options)
    if not options.json:
        calibrating.announce(remarks)
    types = TypeOptions.parse(
        options.token_embedding_type,
        options.output_tensor_type,
        options.tensor_type or (),
        pure=options.pure,
        calibrated=not options.no_calibration,
    )
    to_spend = budget.prepare(checkpoint, options, types) if budget.wanted(options) else None
    file = plan_file(checkpoint, options.type, types) if to_spend is None else to_spend[0].file
    solving = checkpoint.quantization is None and any(t.quantized for t in file.stored)
    recipe = calibrating.recipe_of(options) if solving else None
    beside = memory(checkpoint, file.stored, "gguf") if options.verify else ()
    if to_spend is not None and recipe is not None:
        beside += budget.memory(to_spend[0], recipe)
    plan = planning.make_plan(checkpoint, file.stored, recipe, max_ram, beside)
    chosen = None
    with calibrating.layer_store(options.output, options.resume, options.dry_run) as store:
        if to_spend is not None and recipe is not None:
            chosen = budget.choose(*to_spend, recipe, store)
            file, types = chosen.plan, chosen.options
            plan = planning.make_plan(checkpoint, file.stored, recipe, max_ram, beside, plan.base)
        if options.dry_run:
            planning.report(plan, options, gguf_grid, recipe, None if chosen is None else chosen.expected_kld)
            return
        kv_layout = calibrating.kv_layout(checkpoint, options)
        check = check_of(options.output, checkpoint, file.fewest_bits(checkpoint)) if options.verify else None
        layers, record = None, calibrating.stored_record(checkpoint)
        if recipe is not None:
            layers, record = calibrating.quantized_layers(checkpoint, file.grids, recipe, store, plan)
            if chosen is not None:
                record["expected_kld"] = chosen.expected_kld
        written = export_gguf(
            checkpoint,
            options.output,
            file.file_type,
            types,
            layers=layers,
            record=record,
            kv_layout=kv_layout,
            check=check,
        )
    report(checkpoint, options, written, record, remarks, began)
