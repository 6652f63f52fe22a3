"""What `gptq`, `export` and `demo` share: from options to calibrated layers, and the report of how they came out."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from qwen_quant.checkpoint import Checkpoint
    from qwen_quant.grids.kv_layout import KVCacheSpec
    from qwen_quant.quantize.layer import LinearReport, QuantizedLayer
    from qwen_quant.quantize.plan import Plan
    from qwen_quant.quantize.recipe import GridChoice, Recipe
    from qwen_quant.quantize.resume import LayerStore


@dataclass(frozen=True)
class CalibrationOptions:
    """The options of calibration and of planning, parsed, which `gptq` and `export` share."""

    dataset: str
    num_samples: int
    seq_len: int
    seed: int
    damp_percent: float
    correct_targets: bool
    output_aware: bool
    device: str
    no_calibration: bool
    resume: bool
    dry_run: bool
    max_ram: str | None
    kv_cache: str | None
    kv_bits_budget: float


def recipe_of(options: CalibrationOptions, desc_act: bool = False) -> Recipe:
    """The recipe that a command line asks for."""
    from qwen_quant.quantize.recipe import Recipe

    return Recipe(
        calibrate=not options.no_calibration,
        dataset=options.dataset,
        num_samples=options.num_samples,
        seq_len=options.seq_len,
        seed=options.seed,
        damp_percent=options.damp_percent,
        correct_targets=options.correct_targets,
        output_aware=options.output_aware,
        desc_act=desc_act,
        device=options.device,
    )


@contextlib.contextmanager
def layer_store(output: Path, resume: bool, dry_run: bool = False) -> Iterator[LayerStore | None]:
    """Where the finished layers of a run lie until `output` is complete: a hidden folder beside it. A dry run has none.

    A killed run leaves it behind, and so does a failed or interrupted one that was started with `resume`. Without
    `resume` what an earlier run left is removed first.
    """
    from qwen_quant.quantize.resume import LayerStore

    if dry_run:
        yield None
        return
    place = Path(os.path.abspath(output))
    store = LayerStore(place.with_name(f".{place.name}.layers"))
    if not resume:
        store.discard()
    try:
        yield store
    except BaseException:
        if not resume:
            store.discard()
        raise
    store.discard()


def quantized_layers(
    checkpoint: Checkpoint,
    grids: GridChoice,
    recipe: Recipe,
    store: LayerStore | None = None,
    plan: Plan | None = None,
) -> tuple[Iterator[QuantizedLayer], dict[str, Any]]:
    """The stream of quantized layers, not yet started, and the record that goes into the artifact. What `plan` has in
    files lies beside the output, as `store` does."""
    from qwen_quant.quantize.stream import gptq_layers, plain_layers

    if not recipe.calibrate:
        return plain_layers(checkpoint, grids), recipe.record()
    windows, fingerprint = calibration_windows(checkpoint, recipe)
    record = recipe.record(fingerprint) | {"num_samples": len(windows)}
    spill = store.folder.parent if store is not None and plan is not None and plan.spill else None
    keep_activations = plan is None or plan.keep_activations
    return gptq_layers(checkpoint, grids, windows, recipe, store, keep_activations, spill), record


def calibration_windows(checkpoint: Checkpoint, recipe: Recipe) -> tuple[np.ndarray, str]:
    """The tokens [samples, seq_len] that the recipe calibrates on, and the hash of the text they come from."""
    from qwen_quant import calib_data
    from qwen_quant.tokenizer import Tokenizer

    documents = calib_data.load(recipe.dataset)
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    windows = calib_data.sample(documents, tokenizer, recipe.num_samples, recipe.seq_len, recipe.seed)
    return windows, calib_data.fingerprint(documents)


def stored_record(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The recipe in a GPTQ checkpoint of ours; what others wrote about theirs, as far as it has the same form.

    None for a checkpoint in full precision.
    """
    if checkpoint.quantization is None:
        return None
    meta = checkpoint.quantization.raw.get("meta")
    record = meta.get("recipe") if isinstance(meta, dict) else None
    return record if isinstance(record, dict) else {}


def kv_layout(checkpoint: Checkpoint, options: CalibrationOptions) -> KVCacheSpec | None:
    """The layout of the KV cache that a command line asks to store; None when it asks for none."""
    from qwen_quant.cli.kv import KVOptions, layout_to_store

    if options.kv_cache is None:
        return None
    return layout_to_store(
        checkpoint,
        KVOptions(
            options.kv_cache,
            options.kv_bits_budget,
            options.dataset,
            seq_len=options.seq_len,
            seed=options.seed,
        ),
    )


def peak_rss_mb() -> float:
    """The largest resident memory of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


class Written(Protocol):
    """What every exporter returns."""

    bytes: int
    types: dict[str, str]
    layers: list[QuantizedLayer]
    unquantized: dict[str, str]


def result_fields(
    checkpoint: Checkpoint, output: Path, written: Written, record: dict[str, Any] | None, seconds: float
) -> dict[str, Any]:
    """What --json prints of a written artifact."""
    return {
        "output": str(output),
        "bytes": written.bytes,
        "types": written.types,
        "left_out": checkpoint.left_out,
        "layers": _layer_fields(written.layers),
        "layer_seconds": [{"seconds": layer.seconds, **layer.parts} for layer in written.layers],
        "unquantized": written.unquantized,
        "recipe": record,
        "seconds": seconds,
        "peak_rss_mb": peak_rss_mb(),
    }


def _layer_fields(layers: list[QuantizedLayer]) -> list[dict[str, Any]]:
    """Each linear layer's report."""
    return [
        {
            "name": report.name,
            "grid": report.grid,
            "error": report.error,
            "rtn_error": report.rtn_error,
            "damping": report.damping,
            "tokens": report.tokens,
            "fallback": report.fallback,
            "pooled": report.pooled,
            "note": report.note,
        }
        for layer in layers
        for report in layer.reports
    ]


def layer_table(layers: list[QuantizedLayer]) -> Table:
    """Errors of the linear layers, a row for each decoder layer: the share of round-to-nearest's that is left."""
    from rich.table import Table

    table = Table(title="output error, as a share of round-to-nearest's")
    table.add_column("layer", justify="right")
    names = list(dict.fromkeys(_column(report) for layer in layers for report in layer.reports))
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("s", justify="right")
    for layer in layers:
        cells = (_share([r for r in layer.reports if _column(r) == name]) for name in names)
        table.add_row("" if layer.layer < 0 else str(layer.layer), *cells, f"{layer.seconds:.1f}")
    return table


def _column(report: LinearReport) -> str:
    """`q`, `down`; the same for all experts of a layer: `experts gate`; of Qwen (1) `attn c`, `mlp w1`; `lm_head`."""
    parts = report.name.removesuffix(".weight").removesuffix("_proj").split(".")
    first = 4 if parts[0] == "model" else 3
    return " ".join(part for part in parts[first:] or parts[-1:] if not part.isdigit())


def _share(reports: list[LinearReport]) -> str:
    """What is left of round-to-nearest's error on average; `!` when a solve failed."""
    if not reports:
        return ""
    mean = sum(r.error / max(r.rtn_error, 1e-30) for r in reports) / len(reports)
    return f"{mean:.3f}{'!' if any(r.fallback for r in reports) else ''}"


def unknown_tensors(checkpoint: Checkpoint) -> list[str]:
    """A note on the stored tensors that the model does not have; none where there are none."""
    from qwen_quant.checkpoint import UNKNOWN

    names = [name for name, reason in checkpoint.left_out.items() if reason == UNKNOWN]
    if not names:
        return []
    some = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}"
    return [f"{checkpoint.folder}: {len(names)} tensors are {UNKNOWN} and left out: {some}"]


def plain_experts(checkpoint: Checkpoint, options: CalibrationOptions) -> list[str]:
    """A note that --output-aware does nothing for experts; none where there are none."""
    if checkpoint.spec.moe is None or not options.output_aware:
        return []
    return [
        f"{checkpoint.folder}: --output-aware is for attention and dense layers; experts are solved without it"
    ]


def announce(notes: list[str]) -> None:
    """What an exporter has to say before the work begins, on standard error."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def print_notes(layers: list[QuantizedLayer], unquantized: dict[str, str]) -> None:
    """Fallbacks by name, experts that saw few tokens, other notes, and what stays in full precision, each reason once;
    on standard error."""
    for layer in layers:
        cold = {r.name.split(".")[5]: r.tokens for r in layer.reports if r.pooled}
        if cold:
            listed = ", ".join(f"{expert} ({tokens})" for expert, tokens in cold.items())
            print(
                f"layer {layer.layer}: these experts saw few tokens (their number) and are calibrated in part on "
                f"the whole layer's: {listed}; more --num-samples help",
                file=sys.stderr,
            )
        for report in layer.reports:
            if report.fallback:
                print(f"warning: {report.name}: {report.fallback}", file=sys.stderr)
    noted = {report.name: report.note for layer in layers for report in layer.reports if report.note}
    for names, note in _by_text(noted):
        print(f"note: {names} ({note})", file=sys.stderr)
    for names, reason in _by_text(unquantized):
        print(f"not quantized: {names} ({reason})", file=sys.stderr)


def _by_text(texts: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Each text once, with the tensors that it is about: `NAME and 3 more`."""
    found: dict[str, list[str]] = {}
    for name, text in texts.items():
        found.setdefault(text, []).append(name)
    for text, names in found.items():
        yield names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", text
