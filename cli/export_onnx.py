"""`qwen-quant export --format onnx`: a checkpoint as a folder that onnxruntime and what is built on it open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwen_quant.cli import calibrating
from qwen_quant.cli.checking import check_of, memory
from qwen_quant.cli.exported import report

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qwen_quant.checkpoint import Checkpoint
    from qwen_quant.cli.export import ExportOptions
    from qwen_quant.exporters.onnx import Form, Written
    from qwen_quant.quantize.kv_ranges import ChannelScales
    from qwen_quant.quantize.plan import Plan

MEASURED_WINDOWS, MEASURED_TOKENS = 2, 128  # of calibration text, for the precision of each product


def run(options: ExportOptions) -> None:
    """Quantize where needed, write, and report."""
    import time

    from qwen_quant.checkpoint import Checkpoint
    from qwen_quant.cli import planning
    from qwen_quant.exporters.onnx import notes, stored_tensors

    began = time.monotonic()
    max_ram = planning.parse_ram(options.max_ram)
    checkpoint = Checkpoint.open(options.model)
    remarks = notes(checkpoint) + calibrating.unknown_tensors(checkpoint) + cache_notes(options)
    remarks += calibrating.plain_experts(checkpoint, options)
    if not options.json:
        calibrating.announce(remarks)
    form = form_of(options)
    _, grid = form.resolved(checkpoint)
    solving = grid is not None and checkpoint.quantization is None
    recipe = calibrating.recipe_of(options) if solving else None
    stored = stored_tensors(checkpoint, form)
    after = memory(checkpoint, stored, "onnx", form.accuracy_level == "0") if options.verify else ()
    plan = planning.make_plan(checkpoint, stored, recipe, max_ram, after)
    if options.dry_run:
        grids = {choice.name: choice.grid for choice in form.choices(checkpoint).values() if choice.grid}
        planning.report(plan, options, grids.__getitem__, recipe)
        return
    written, record = write(options, checkpoint, form, recipe, plan)
    report(checkpoint, options, written, record, remarks, began)


def form_of(options: ExportOptions) -> Form:
    """What the command line asks for."""
    from qwen_quant.exporters.onnx import Form

    return Form(
        file_type=options.type,
        group_size=options.group_size,
        sym=options.sym,
        token_embedding_type=options.token_embedding_type,
        output_tensor_type=options.output_tensor_type,
        opset=options.opset,
        accuracy_level=options.accuracy_level.lower(),
    )


def write(
    options: ExportOptions, checkpoint: Checkpoint, form: Form, recipe: Any, plan: Plan
) -> tuple[Written, dict[str, Any] | None]:
    """Write the folder; what was written, and the recipe of its integers."""
    from qwen_quant.exporters.onnx import export_onnx

    cache = cache_of(options, checkpoint)
    check = (
        check_of(options.output, checkpoint, bits_of(options, checkpoint, form)) if options.verify else None
    )
    with calibrating.layer_store(options.output, options.resume) as store:
        layers, record = None, calibrating.stored_record(checkpoint)
        if recipe is not None:
            layers, record = calibrating.quantized_layers(
                checkpoint, form.grids(checkpoint), recipe, store, plan
            )
        written = export_onnx(
            checkpoint,
            options.output,
            form,
            layers=layers,
            record=record,
            texts=texts_for(options, checkpoint) if form.accuracy_level == "auto" else None,
            cache=cache,
            check=check,
            overwrite=options.overwrite,
        )
    return written, record


def cache_of(options: ExportOptions, checkpoint: Checkpoint) -> ChannelScales | None:
    """Scales of the quantized cache that is asked for. Raises UsageError for another than int8 and int4."""
    from qwen_quant import calib_data
    from qwen_quant.cli.kv import NUM_SAMPLES
    from qwen_quant.errors import UsageError
    from qwen_quant.quantize.kv_ranges import channel_scales
    from qwen_quant.tokenizer import Tokenizer

    if options.kv_cache is None:
        return None
    if options.kv_cache not in ("int8", "int4"):
        raise UsageError(
            f"--kv-cache {options.kv_cache}: ONNX's attention has int8 or int4 in all layers; choose one, or drop it"
        )
    documents = calib_data.load(options.dataset)
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    length = min(options.seq_len, checkpoint.spec.plain_context)
    windows = calib_data.sample(documents, tokenizer, NUM_SAMPLES, length, options.seed)
    return channel_scales(checkpoint, windows, int(options.kv_cache[3:]))


def texts_for(options: ExportOptions, checkpoint: Checkpoint) -> npt.NDArray[np.int32]:
    """Token windows [n, T] on which the precision of each product is chosen."""
    from qwen_quant import calib_data
    from qwen_quant.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    length = min(MEASURED_TOKENS, checkpoint.spec.plain_context)
    documents = calib_data.load(options.dataset)
    return calib_data.sample(documents, tokenizer, MEASURED_WINDOWS, length, options.seed)


def bits_of(options: ExportOptions, checkpoint: Checkpoint, form: Form) -> int:
    """The fewest that anything is stored with."""
    return min(form.fewest_bits(checkpoint), 16 if options.kv_cache is None else int(options.kv_cache[3:]))


def cache_notes(options: ExportOptions) -> list[str]:
    """Who reads a folder with a quantized cache."""
    from qwen_quant.exporters.onnx_folder import READERS

    if options.kv_cache not in READERS:
        return []
    return [
        f"with the {options.kv_cache} cache it runs on {READERS[options.kv_cache]}; others have FP32 ones"
    ]
