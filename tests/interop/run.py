"""Do the readers of GPTQ checkpoints compute what we say is in ours?

    python tests/interop/run.py gptqmodel            # one reader: gptqmodel, auto-gptq, optimum, or all
    python tests/interop/run.py all --envs ~/envs

Makes a pinned virtual environment per reader (kept in --envs), quantizes checkpoints with `qwen-quant gptq`, loads
each with the reader on the CPU in FP32, and compares the logits with those of the reference model over the weights
as we decode them. Exit codes: 0 equal, 1 not equal, 3 when an environment could not be installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import (
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qwen_quant.checkpoint import Checkpoint, resolve_model
from qwen_quant.evaluate.report import HELD_OUT
from qwen_quant.model import load_model
from qwen_quant.tokenizer import Tokenizer

# Largest difference of a logit. The readers decode the same numbers; their FP32 sums run in another order, and
# transformers keeps what is not quantized in FP16.
TOLERANCE = 1e-3
BATCH, SEQ_LEN = 2, 96
UNAVAILABLE = 3

TORCH = "torch==2.13.0"
ENVIRONMENTS = {
    # Each line is one call of pip: the sources of the second need the first.
    "gptqmodel": [
        [TORCH, "numpy<2.4", "setuptools", "wheel"],
        ["gptqmodel==7.6.0", "optimum==2.3.0", "transformers==5.23.0"],
    ],
    "auto-gptq": [
        [TORCH, "numpy<2.4", "setuptools", "wheel"],
        ["transformers==4.57.6", "peft==0.17.1", "datasets==4.4.2", "accelerate==1.12.0", "optimum==2.0.0"],
        ["auto-gptq==0.7.1"],
    ],
}
# Reader: the environments and the ways of loading (see peer.py).
READERS = {
    "gptqmodel": [("gptqmodel", "gptqmodel")],
    "auto-gptq": [("auto-gptq", "auto-gptq")],
    "optimum": [("gptqmodel", "transformers"), ("auto-gptq", "transformers")],
}


@dataclass(frozen=True)
class Case:
    """One checkpoint: options of `qwen-quant gptq`, and the loads that cannot read it, for `reason`."""

    name: str
    options: str
    model: str = "reference"
    refused: tuple[tuple[str, str], ...] = ()
    reason: str = ""


CASES = [
    Case("int4-g128", "--bits 4 --group-size 128"),
    Case("int4-g32-desc-act", "--bits 4 --group-size 32 --desc-act"),
    Case("int8-g64", "--bits 8 --group-size 64"),
    Case("int8-row-desc-act", "--bits 8 --group-size -1 --desc-act"),
    Case("int3-g64", "--bits 3 --group-size 64"),
    Case("int2-g32", "--bits 2 --group-size 32"),
    Case(
        "int4-g64-asym",
        "--bits 4 --group-size 64 --asym",
        refused=(("gptqmodel", "gptqmodel"),),
        reason="GPTQModel takes asymmetric v1 checkpoints of its own only",
    ),
    Case(
        "int4-g64-asym-v2",
        "--bits 4 --group-size 64 --asym --checkpoint-format gptq_v2",
        refused=(("auto-gptq", "auto-gptq"), ("auto-gptq", "transformers")),
        reason="auto-gptq knows v1 only",
    ),
    Case("qwen2-int4-g64", "--bits 4 --group-size 64", model="qwen2"),
    Case(
        "qwen2-int4-short-last-group",
        "--bits 4 --group-size 128",
        model="qwen2",
        refused=(("auto-gptq", "auto-gptq"), ("auto-gptq", "transformers")),
        reason="auto-gptq cuts the columns into whole groups; the model's 192 are 128 and 64",
    ),
    *(
        Case(
            f"{model}-int4-g32",
            "--bits 4 --group-size 32",
            model=model,
            refused=(("gptqmodel", "transformers"), ("auto-gptq", "auto-gptq")),
            reason="transformers 5 fuses the experts before they are read; auto-gptq alone does not know them",
        )
        for model in ("qwen2-moe", "qwen3-moe")
    ),
]


class Unavailable(Exception):
    """An environment that could not be installed."""


def environment(name: str, folder: Path) -> Path:
    """The Python of environment `name`, installed under `folder` unless it is there with the same pins."""
    target = folder / name
    python, stamp = target / "bin" / "python", target / "pins.txt"
    steps = ENVIRONMENTS[name]
    if stamp.exists() and stamp.read_text() == repr(steps):
        return python
    print(f"installing {name} in {target}", flush=True)
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", target], check=True)
    for packages in steps:
        done = subprocess.run(
            [python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "ERROR" in line] or [done.stderr[-300:]]
            raise Unavailable(f"{name}: pip install {' '.join(packages)}: {errors[0]}")
    stamp.write_text(repr(steps))
    return python


def random_models(folder: Path) -> dict[str, str]:
    """Random Qwen2 (with biases and an untied head), Qwen2-MoE and Qwen3-MoE by name."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": Checkpoint(resolve_model("reference")).spec.vocab_size,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
    models = {
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**sizes)),
        "qwen2-moe": Qwen2MoeForCausalLM(
            Qwen2MoeConfig(**sizes, **experts, shared_expert_intermediate_size=96)
        ),
        "qwen3-moe": Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**sizes, **experts, head_dim=32, norm_topk_prob=True)
        ),
    }
    return {name: str(save(model, folder / name)) for name, model in models.items()}


def save(model: PreTrainedModel, folder: Path) -> Path:
    """The model as BF16 with biases that are not 0, beside the bundled model's tokenizer."""
    ignored = shutil.ignore_patterns("*.safetensors", "config.json")
    shutil.copytree(resolve_model("reference"), folder, ignore=ignored)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def quantize(case: Case, model: str, folder: Path) -> Path:
    """The checkpoint of `case`, made by the command line."""
    command = [sys.executable, "-m", "qwen_quant.cli", "gptq", model, "-o", str(folder / case.name)]
    command += [*case.options.split(), "--num-samples", "8", "--seq-len", "128", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{case.name}: {done.stderr}")
    return folder / case.name


def some_tokens() -> np.ndarray:
    """Held-out text as tokens of the bundled model [BATCH, SEQ_LEN]."""
    tokenizer = Tokenizer.from_folder(resolve_model("reference"))
    tokens = tokenizer.encode(HELD_OUT.read_text(encoding="utf-8"))
    return np.array(tokens[: BATCH * SEQ_LEN], dtype=np.int64).reshape(BATCH, SEQ_LEN)


def our_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return load_model(Checkpoint(folder))(torch.from_numpy(tokens)).numpy()


def verdict(case: Case, expected: np.ndarray, out: Path) -> tuple[str, bool]:
    """A line about one checkpoint in one reader, and whether it is as it should be."""
    refusal = out / f"{case.name}.txt"
    if refusal.exists():
        return f"failed: {refusal.read_text().splitlines()[0]}", False
    found = np.load(out / f"{case.name}.npy")
    gap = float(np.abs(found - expected).max())
    agreement = float((found.argmax(-1) == expected.argmax(-1)).mean())
    return f"max abs diff {gap:.1e}, top-1 agreement {agreement:.1%}", gap <= TOLERANCE


def check(
    load: tuple[str, str], python: Path, cases: list[Case], work: Path, expected: dict[str, np.ndarray]
) -> bool:
    """Load every case in one reader; print a line for each. True when all are equal."""
    environment_name, route = load
    out = work / f"{environment_name}-{route}"
    out.mkdir()
    readable = [case for case in cases if load not in case.refused]
    command = [python, Path(__file__).with_name("peer.py"), route, work / "tokens.npy", out]
    log = (out / "log.txt").open("w")
    done = subprocess.run(
        [*command, *(work / c.name for c in readable)], stdout=log, stderr=subprocess.STDOUT
    )
    if done.returncode:
        print((out / "log.txt").read_text()[-2000:])
        print(f"{route} in {environment_name}: ended with {done.returncode}")
        return False
    equal = True
    for case in cases:
        mark, line = "skip", case.reason
        if case in readable:
            line, right = verdict(case, expected[case.name], out)
            mark = "ok" if right else "FAIL"
            equal &= right
        print(f"{mark:4}  {route:12} in {environment_name:10} {case.name:18} {line}", flush=True)
    return equal


def main() -> int:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reader", choices=[*READERS, "all"])
    parser.add_argument(
        "--envs", type=Path, default=cache / "qwen-quant" / "interop", help="where environments are kept"
    )
    options = parser.parse_args()
    chosen = READERS if options.reader == "all" else {options.reader: READERS[options.reader]}
    loads = [load for reader in chosen.values() for load in reader]
    try:
        pythons = {name: environment(name, options.envs.resolve()) for name, _ in dict.fromkeys(loads)}
    except Unavailable as error:
        print(f"not checked: {error}")
        return UNAVAILABLE
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        models = {"reference": "reference", **random_models(work)}
        tokens = some_tokens()
        np.save(work / "tokens.npy", tokens)
        expected = {case.name: our_logits(quantize(case, models[case.model], work), tokens) for case in CASES}
        equal = [check(load, pythons[load[0]], CASES, work, expected) for load in loads]
        return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
