"""Load GPTQ checkpoints with one of their readers and save the logits. Runs inside that reader's environment.

    python peer.py ROUTE TOKENS.npy OUT CHECKPOINT...

ROUTE is gptqmodel, transformers or auto-gptq. For each checkpoint folder OUT gets NAME.npy, float32
[batch, seq, vocab], or NAME.txt with the reason why the reader refused. Everything computes in FP32 on the CPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # GPTQModel crashes on two cores with its own choice
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # otherwise GPTQModel compiles for minutes

import numpy as np
import torch


def load_gptqmodel(folder: Path) -> Any:
    from gptqmodel import BACKEND, GPTQModel

    # This backend decodes as the format says; the faster ones round activations or weights to BF16.
    return GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model


def load_transformers(folder: Path) -> Any:
    """transformers with optimum, over whichever of GPTQModel and auto-gptq the environment has."""
    from transformers import AutoModelForCausalLM, GPTQConfig

    options: dict[str, Any] = {}
    if importlib.util.find_spec("gptqmodel"):
        bits = json.loads((folder / "quantize_config.json").read_text())["bits"]
        options["quantization_config"] = GPTQConfig(bits=bits, backend="gptq_torch")
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", torch_dtype=torch.float16, **options
    )


def load_auto_gptq(folder: Path) -> Any:
    from auto_gptq import AutoGPTQForCausalLM
    from auto_gptq.modeling import _const, auto
    from auto_gptq.modeling.qwen2 import Qwen2GPTQForCausalLM

    # auto-gptq ended before Qwen3, whose layers have the names of Qwen2's.
    _const.SUPPORTED_MODELS.append("qwen3")
    auto.GPTQ_CAUSAL_LM_MODEL_MAP["qwen3"] = Qwen2GPTQForCausalLM
    return AutoGPTQForCausalLM.from_quantized(
        str(folder),
        device="cpu",
        use_safetensors=True,
        use_triton=False,
        disable_exllama=True,
        disable_exllamav2=True,
        torch_dtype=torch.float32,
    ).model


LOADERS = {"gptqmodel": load_gptqmodel, "transformers": load_transformers, "auto-gptq": load_auto_gptq}


def main(route: str, tokens: str, out: str, *checkpoints: str) -> None:
    torch.set_num_threads(2)
    batch = torch.from_numpy(np.load(tokens))
    for folder in map(Path, checkpoints):
        try:
            model = LOADERS[route](folder).eval()
            torch.nn.Module.float(model)  # scales too; transformers' own float() refuses quantized models
            with torch.no_grad():
                logits = model(input_ids=batch).logits.numpy()
        except Exception as error:  # whatever the reader raises is its answer
            (Path(out) / f"{folder.name}.txt").write_text(f"{type(error).__name__}: {error}")
        else:
            np.save(Path(out) / f"{folder.name}.npy", logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
