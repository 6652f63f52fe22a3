"""Arguments and options that commands share: each spelled, typed and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A folder or file, a Hugging Face id, or 'reference' for the bundled model.",
    ),
]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", show_default=False, help="Where to write; appears only when complete."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", "-t", min=1, show_default=False, help="CPU threads; as many as are fastest by default."
    ),
]
Isa = Annotated[
    str,
    typer.Option(
        "--isa",
        help="CPU instructions of the GGUF engine: auto, scalar, avx2, avx512vnni, avx512bf16, neon or neon-i8mm.",
    ),
]

GroupSize = Annotated[
    int,
    typer.Option("--group-size", help="Columns that share a scale: 32, 64, 128, or -1 for whole rows."),
]
Sym = Annotated[bool, typer.Option("--sym/--asym", help="Symmetric grid, or one with a zero point.")]
CacheTypeK = Annotated[
    str | None,
    typer.Option(
        "--cache-type-k", "-ctk", show_default="f16", help="How keys are cached: f16, int8, int4 or auto."
    ),
]
CacheTypeV = Annotated[
    str | None,
    typer.Option("--cache-type-v", "-ctv", show_default="f16", help="How values are cached: as keys."),
]
StoredKVCache = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        show_default=False,
        help="Also calibrate the KV cache and store its layout: int8, int4, auto (mixed by measured loss), "
        "or a file of `qwen-quant kv`.",
    ),
]
KVBitsBudget = Annotated[
    float,
    typer.Option(
        "--kv-bits-budget", help="Mean bits per cached number that --kv-cache auto may use, scales included."
    ),
]

NoCalibration = Annotated[
    bool, typer.Option("--no-calibration", help="Round to nearest on the same grid instead of GPTQ.")
]
DampPercent = Annotated[
    float, typer.Option("--damp-percent", help="Damping of the Hessian, as a share of its mean diagonal.")
]
CorrectTargets = Annotated[
    bool,
    typer.Option(
        "--correct-targets/--no-correct-targets",
        help="Make up for what quantizing earlier layers did: better, but calibration computes each layer twice.",
    ),
]
OutputAware = Annotated[
    bool,
    typer.Option(
        "--output-aware/--no-output-aware",
        help="Weigh errors by what they do to the predictions: better, but takes a backward pass through the model.",
    ),
]
Dataset = Annotated[
    str,
    typer.Option("--dataset", help="'builtin', a .txt or .jsonl file, a folder, or a Hugging Face data set."),
]
NumSamples = Annotated[int, typer.Option("--num-samples", help="Calibration windows.")]
SeqLen = Annotated[int, typer.Option("--seq-len", help="Tokens in a calibration window.")]
Seed = Annotated[int, typer.Option("--seed", help="Chooses the calibration windows.")]
Device = Annotated[str, typer.Option("--device", help="Where to calibrate and solve: cpu, cuda, cuda:1 …")]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on from the layers a killed run finished; keep them if this one stops too."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify", help="Run what was written against the checkpoint before it is kept."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print what would be written, with memory and time; write nothing."),
]
MaxRam = Annotated[
    str | None,
    typer.Option(
        "--max-ram",
        metavar="SIZE",
        show_default=False,
        help="Refuse at once what would need more memory, like 8G or 500M (powers of ten).",
    ),
]
