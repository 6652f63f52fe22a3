"""`qwen-quant export --format onnx`: a checkpoint as a folder that onnxruntime and what is built on it open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_quant.cli import calibrating

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qwen_quant.checkpoint import Checkpoint
    from qwen_quant.cli.export import ExportOptions
    from qwen_quant.exporters.onnx import Form, Written
    from qwen_quant.quantize.kv_ranges import ChannelScales

MEASURED_WINDOWS, MEASURED_TOKENS = 4, 128  # of calibration text, for the precision of each product


def run(options: ExportOptions) -> None:
    """Quantize where needed, write, and report."""
    import time

    from qwen_quant.checkpoint import Checkpoint
    from qwen_quant.cli import planning
    from qwen_quant.exporters.onnx import notes, stored_tensors
    from qwen_quant.grids import IntGrid

    began = time.monotonic()
    max_ram = planning.parse_ram(options.max_ram)
    checkpoint = Checkpoint.open(options.model)
    remarks = notes(checkpoint)
    if not options.json:
        calibrating.announce(remarks)
    form = form_of(options)
    _, grid = form.resolved(checkpoint)
    solving = grid is not None and checkpoint.quantization is None
    recipe = calibrating.recipe_of(options) if solving else None
    plan = planning.make_plan(checkpoint, stored_tensors(checkpoint, form), recipe, max_ram)
    if options.dry_run:
        # An embedding's grid may be another than the layers'; it is rounded about as quickly.
        planning.report(plan, options, lambda kind: grid or IntGrid(8), recipe)
        return
    written, record = write(options, checkpoint, form, recipe, plan.keep_contexts)
    seconds = time.monotonic() - began
    if options.json:
        from qwen_quant.cli.output import print_json

        fields = calibrating.result_fields(options.output, written, record, seconds)
        print_json({**fields, "types": written.types, "notes": remarks, "check": written.check})
        return
    report(options, written, seconds)


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
    options: ExportOptions, checkpoint: Checkpoint, form: Form, recipe: Any, keep_contexts: bool
) -> tuple[Written, dict[str, Any] | None]:
    """Write the folder; what was written, and the recipe of its integers."""
    from qwen_quant.exporters.onnx import export_onnx, grid_choice

    _, grid = form.resolved(checkpoint)
    cache = cache_of(options, checkpoint)
    with calibrating.layer_store(options.output, options.resume) as store:
        layers, record = None, calibrating.stored_record(checkpoint)
        if recipe is not None and grid is not None:
            layers, record = calibrating.quantized_layers(
                checkpoint, grid_choice(grid), recipe, store, keep_contexts
            )
        written = export_onnx(
            checkpoint,
            options.output,
            form,
            layers=layers,
            record=record,
            texts=texts_for(options, checkpoint) if form.accuracy_level == "auto" else None,
            cache=cache,
            check=check_of(options, checkpoint, form) if options.verify else None,
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


def check_of(options: ExportOptions, checkpoint: Checkpoint, form: Form) -> Callable[[Path], dict[str, Any]]:
    """What runs the written folder against the checkpoint."""
    from qwen_quant.evaluate.selfcheck import self_check

    bits = min(form.fewest_bits(checkpoint), 16 if options.kv_cache is None else int(options.kv_cache[3:]))
    return lambda folder: self_check(folder, checkpoint, bits, where=options.output)


def report(options: ExportOptions, written: Written, seconds: float) -> None:
    """What was written, for a terminal."""
    from rich.console import Console

    from qwen_quant.exporters.onnx_folder import READERS

    if written.layers and written.layers[0].reports:
        Console().print(calibrating.layer_table(written.layers))
    calibrating.print_notes(written.layers, written.unquantized)
    counts = Counter(written.types.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    if options.kv_cache is not None:
        print(
            f"note: with the {options.kv_cache} cache it runs on {READERS[options.kv_cache]}; others have FP32 ones"
        )
    print(f"{options.output}: {written.bytes / 1e6:.1f} MB, {seconds:.1f} s, tensors: {kinds}")
    if written.check:
        kld, same = written.check["kld_mean"], written.check["top1_agreement"]
        print(
            f"checked on {written.check['tokens']} tokens: KLD {kld:.5f}, top-1 agreement {100 * same:.2f} %"
        )
