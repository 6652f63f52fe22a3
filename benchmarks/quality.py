"""How far each quantization is from BF16: ours against llama-quantize's with an importance matrix of the same text, and
int4 in groups of 128 against other quantizers' defaults.

    python benchmarks/quality.py MODEL TYPE... --llama-bin DIR --data TEXT [--chunks 100 --json FILE]
    python benchmarks/quality.py MODEL --peer GPTQModel=PYTHON --peer AutoRound=PYTHON --data TEXT

DIR holds llama.cpp's llama-quantize, llama-imatrix and llama-perplexity. Both programs see the same calibration
windows (ours as tokens, theirs as that text), both files have the type's own mix of tensor types, and both are
measured by llama-perplexity against the same F32 file. `by eval` is what `qwen-quant eval` says of our file. Either
program rounds activations in its own way as it multiplies; `weights alone` are those of our file decoded to F32, with
which neither does, so that there both must say the same. PYTHON is that of an environment with the peer; peers
calibrate on our windows, and `qwen-quant eval` measures all checkpoints.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import perplexity
from peers import ENVIRONMENT, checkpoint_in, peer_command, peer_of, sampled_windows

CTX = 512
MEAN_KLD = re.compile(r"Mean\s+KLD:\s*(-?[\d.]+)\s*±\s*([\d.]+)")


@dataclass(frozen=True)
class Row:
    """One type: bytes of the files and mean KLD in nats as llama-perplexity has it, and as our evaluator does; that of
    the weights alone is of our file decoded to F32.
    """

    type: str
    bytes: int
    peer_bytes: int
    kld: float
    peer_kld: float
    kld_by_eval: float
    weights_kld: float
    weights_kld_by_eval: float

    @property
    def ratio(self) -> float:
        return self.kld / self.peer_kld


def run(command: list[str | Path], folder: Path | None = None) -> str:
    """What a command prints, run in `folder`. Exits with its last lines when it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        env=ENVIRONMENT,
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        sys.exit(f"{(done.stdout + done.stderr)[-3000:]}\n{command[0]} failed")
    return done.stdout + done.stderr


def ours(*arguments: str | Path) -> str:
    return run([sys.executable, "-m", "qwen_quant.cli", *arguments])


def write_calibration_text(model: str, samples: int, path: Path) -> None:
    """The windows that `export` calibrates with, as text."""
    from qwen_quant.checkpoint import resolve_model
    from qwen_quant.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(resolve_model(model))
    windows = sampled_windows(model, samples, CTX)
    path.write_text("".join(tokenizer.decode(window.tolist()) for window in windows))


def kld_by_eval(file: Path, options: argparse.Namespace) -> float:
    """Mean KLD in nats, as `qwen-quant eval` has it."""
    found = ours(
        "eval", file, "--reference", options.model, "--data", options.data, "--ctx", str(CTX),
        "--max-windows", str(options.chunks), "--json",
    )  # fmt: skip
    return float(json.loads(found.splitlines()[-1])["kld_mean"])


class Peer:
    """llama.cpp's programs, working in `folder` on the F32 file of the model."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.bin, self.folder, self.data = options.llama_bin, folder, options.data
        self.measuring = ["-c", str(CTX), "--chunks", str(options.chunks), "-t", str(options.threads)]
        self.float32, self.imatrix = folder / "f32.gguf", folder / "imatrix.gguf"
        self.base = folder / "base.kld"
        ours("export", options.model, "-o", self.float32, "--type", "F32", "--json")
        text = folder / "calibration.txt"
        write_calibration_text(options.model, options.samples, text)
        made = [self.bin / "llama-imatrix", "-m", self.float32, "-f", text, "-o", self.imatrix]
        run([*made, "-c", str(CTX), "-t", str(options.threads), "--parse-special"])
        run([*self._perplexity(self.float32), "--kl-divergence-base", self.base])

    def _perplexity(self, file: Path) -> list[str | Path]:
        return [self.bin / "llama-perplexity", "-m", file, "-f", self.data, *self.measuring]

    def quantize(self, file_type: str) -> Path:
        output = self.folder / f"peer-{file_type}.gguf"
        run([self.bin / "llama-quantize", "--imatrix", self.imatrix, self.float32, output, file_type])
        return output

    def decode(self, file: Path) -> Path:
        output = file.with_name(f"{file.stem}-decoded.gguf")
        run([self.bin / "llama-quantize", "--allow-requantize", file, output, "F32"])
        return output

    def mean_kld(self, file: Path) -> float:
        text = perplexity.divergence([*self._perplexity(file), "--kl-divergence-base", self.base])
        found = MEAN_KLD.search(text)
        assert found is not None
        return float(found[1])


def measure(file_type: str, options: argparse.Namespace, peer: Peer) -> Row:
    """Both programs' files of one type."""
    mine = peer.folder / f"ours-{file_type}.gguf"
    ours(
        "export", options.model, "-o", mine, "--type", file_type, "--json",
        "--num-samples", str(options.samples), *options.export_options.split(),
    )  # fmt: skip
    theirs, decoded = peer.quantize(file_type), peer.decode(mine)
    return Row(
        file_type,
        mine.stat().st_size,
        theirs.stat().st_size,
        peer.mean_kld(mine),
        peer.mean_kld(theirs),
        kld_by_eval(mine, options),
        peer.mean_kld(decoded),
        kld_by_eval(decoded, options),
    )


def compare_types(options: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """Each of the types beside llama-quantize's."""
    peer = Peer(options, folder)
    rows = []
    print(
        "| type | bytes, ours | bytes, llama.cpp | KLD, ours | KLD, llama.cpp | ratio | ours, by eval "
        "| our weights alone | by eval |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for file_type in options.types:
        row = measure(file_type, options, peer)
        print(
            f"| {row.type} | {row.bytes:,} | {row.peer_bytes:,} | {row.kld:.5f} | {row.peer_kld:.5f} "
            f"| {row.ratio:.2f} | {row.kld_by_eval:.5f} | {row.weights_kld:.5f} | {row.weights_kld_by_eval:.5f} |",
            flush=True,
        )
        rows.append(asdict(row) | {"ours/peer": row.ratio})
    return rows


def compare_int4(options: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """Int4 in groups of 128 beside the peers' defaults."""
    from qwen_quant.checkpoint import resolve_model

    model = resolve_model(options.model).resolve()
    windows, mine = folder / "windows.npy", folder / "ours"
    np.save(windows, sampled_windows(options.model, options.samples, CTX))
    ours(
        "gptq",
        options.model,
        "-o",
        mine,
        "--num-samples",
        str(options.samples),
        "--seq-len",
        str(CTX),
        "--json",
    )
    kld = kld_by_eval(mine, options)
    rows = []
    print(f"| int4, groups of 128 | KLD by eval | ours ({kld:.5f}) / it |")
    print("|---|---:|---:|")
    for name, python in options.peer:
        output = folder / name
        run(peer_command(name, python, model, windows, output, options.peer_dtype), folder)
        peer_kld = kld_by_eval(checkpoint_in(output), options)
        print(f"| {name} | {peer_kld:.5f} | {kld / peer_kld:.2f} |", flush=True)
        rows.append(
            {"int4_by": name, "kld_by_eval": kld, "peer_kld_by_eval": peer_kld, "ours/peer": kld / peer_kld}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--llama-bin", type=Path)
    parser.add_argument("--peer", type=peer_of, action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--peer-dtype", default="bfloat16")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export-options", default="", help="More options of our export, in one string.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.types and options.llama_bin is None:
        parser.error("types are compared with llama.cpp's programs: --llama-bin DIR")
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        if options.types:
            rows += compare_types(options, Path(scratch))
        if options.peer:
            rows += compare_int4(options, Path(scratch))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
