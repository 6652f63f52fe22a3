"""`qwen-quant kv`: calibrates the cache of keys and values, and stores the layout."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_quant.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from qwen_quant.checkpoint import Checkpoint
    from qwen_quant.grids.kv_layout import KVCacheSpec
    from qwen_quant.quantize.kv_cache import KVCalibration

NUM_SAMPLES = (
    16  # windows are read once for each layer's keys and values: a few are enough for ranges and ranks
)


@dataclass(frozen=True)
class KVOptions:
    """What decides a calibration of the cache."""

    kv_cache: str = "auto"
    bits_budget: float = 4.8
    dataset: str = "builtin"
    num_samples: int = NUM_SAMPLES
    seq_len: int = 512
    seed: int = 0


def command(
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            show_default=False,
            help="A .safetensors file, or a checkpoint folder, where it becomes kv_cache.safetensors.",
        ),
    ],
    kv_cache: Annotated[
        str, typer.Option("--kv-cache", help="int8, int4, or auto: mixed by what each layer costs.")
    ] = "auto",
    bits_budget: options.KVBitsBudget = 4.8,
    dataset: options.Dataset = "builtin",
    num_samples: options.NumSamples = NUM_SAMPLES,
    seq_len: options.SeqLen = 512,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Calibrate the KV cache: layout and bits of each layer's keys and values."""
    from qwen_quant.checkpoint import Checkpoint
    from qwen_quant.grids.kv_file import FILE_NAME, write_kv_file
    from qwen_quant.quantize.kv_cache import record

    checkpoint = Checkpoint.open(model)
    found = calibrate(checkpoint, KVOptions(kv_cache, bits_budget, dataset, num_samples, seq_len, seed))
    path = output / FILE_NAME if output.is_dir() else output
    spec = checkpoint.spec
    write_kv_file(path, found.spec, spec.num_key_value_heads, spec.head_dim, record(found))
    bytes_per_token = found.spec.bytes_per_token(spec.num_key_value_heads, spec.head_dim)
    recent = found.spec.recent_bytes(spec.num_key_value_heads, spec.head_dim)
    if json:
        from qwen_quant.cli.output import print_json

        sizes = {"kv_bytes_per_token": bytes_per_token, "kv_recent_bytes": recent}
        print_json({"output": str(path), **sizes, **record(found)})
        return
    from rich.console import Console

    Console().print(table(found))
    warn_of_bias(found)
    whole = 4 * spec.num_hidden_layers * spec.kv_size
    print(
        f"{path}: {bytes_per_token:,.0f} bytes per token, {bytes_per_token / whole:.3f} of F16, and {recent:,} for "
        f"recent tokens; KLD {found.kld:.5f} nats on the calibration windows"
    )


def calibrate(checkpoint: Checkpoint, wanted: KVOptions) -> KVCalibration:
    """Calibrate on windows of text. Raises UsageError for a --kv-cache that is not int8, int4 or auto."""
    from qwen_quant import calib_data
    from qwen_quant.errors import UsageError
    from qwen_quant.quantize.kv_cache import calibrate_kv
    from qwen_quant.tokenizer import Tokenizer

    fixed = {"int4": 4, "int8": 8, "auto": None}
    if wanted.kv_cache not in fixed:
        raise UsageError(f"--kv-cache {wanted.kv_cache}: choose {', '.join(fixed)}")
    documents = calib_data.load(wanted.dataset)
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    windows = calib_data.sample(documents, tokenizer, wanted.num_samples, wanted.seq_len, wanted.seed)
    return calibrate_kv(checkpoint, windows, wanted.bits_budget, fixed[wanted.kv_cache])


def layout_to_store(checkpoint: Checkpoint, wanted: KVOptions) -> KVCacheSpec:
    """What `gptq` and `export` store for their --kv-cache: a file's layout, or what a calibration finds."""
    from qwen_quant.grids.kv_file import read_kv_file

    spec = checkpoint.spec
    path = Path(wanted.kv_cache)
    if path.suffix == ".safetensors" or path.exists():
        return read_kv_file(path, spec.num_hidden_layers, spec.num_key_value_heads, spec.head_dim)[0]
    return calibrate(checkpoint, wanted).spec


def table(found: KVCalibration) -> Table:
    """A row for each layer."""
    from rich.table import Table

    result = Table(title="KV cache; KLD is what int4 costs there alone, in nats per token")
    for name in ("layer", "|bias|", "keys", "centred", "KLD", "values", "KLD"):
        result.add_column(name, justify="left" if name in ("keys", "values") else "right")
    for report in found.reports:
        result.add_row(
            f"{report.layer}{' !' if report.dangerous else ''}",
            f"{report.key_bias_norm:.1f}",
            f"int{report.key_bits} {report.key_layout}",
            str(report.key_centred),
            f"{report.key_kld:.5f}",
            f"int{report.value_bits} {report.value_layout}",
            f"{report.value_kld:.5f}",
        )
    return result


def warn_of_bias(found: KVCalibration) -> None:
    """Name the layers whose key bias other caches stumble over, on standard error."""
    for report in found.reports:
        if report.dangerous:
            print(
                f"note: layer {report.layer}: the key bias (norm {report.key_bias_norm:.0f}) is "
                f"{report.key_bias_norm / report.key_spread:.0f} times what an input adds to a key; it is taken out "
                "here, but a cache that rounds it with the keys loses them",
                file=sys.stderr,
            )
