"""Other quantizers, each run by the Python of its own environment on token windows that we sampled.

Int4 in groups of 128 with the program's own defaults otherwise, written as a GPTQ checkpoint where the program can.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

# What they run in: GPTQModel wants two workers, also where it counts fewer cores, and nothing has to be fetched.
ENVIRONMENT = os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}

# Each gets a checkpoint, a file of windows int32 [samples, seq_len], an output folder and the model's dtype.
SCRIPTS = {
    "GPTQModel": """
import sys, numpy as np, torch
from gptqmodel import GPTQModel, QuantizeConfig
model, windows, output, dtype = sys.argv[1:]
rows = np.load(windows).tolist()
data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
loaded = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=128), dtype=getattr(torch, dtype))
loaded.quantize(data, batch_size=1)
loaded.save(output)
""",
    "AutoRound": """
import sys, numpy as np, torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
model, windows, output, dtype = sys.argv[1:]
rows = torch.from_numpy(np.load(windows)).long()
loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
rounding = AutoRound(
    loaded, AutoTokenizer.from_pretrained(model), bits=4, group_size=128, device_map="cpu",
    dataset=list(rows.split(1)), nsamples=len(rows), seqlen=rows.shape[1],
)
rounding.quantize_and_save(output, format="auto_gptq")
""",
    "llm-compressor": """
import sys, numpy as np
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM
model, windows, output, dtype = sys.argv[1:]
rows = np.load(windows)
loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()})
recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
oneshot(
    model=loaded, dataset=data, recipe=recipe, max_seq_length=rows.shape[1],
    num_calibration_samples=len(rows), output_dir=output,
)
""",
}


def sampled_windows(model: str, samples: int, seq_len: int) -> np.ndarray:
    """The tokens [samples, seq_len] of the built-in text that our `gptq` and `export` calibrate with."""
    from qwen_quant import calib_data
    from qwen_quant.checkpoint import resolve_model
    from qwen_quant.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(resolve_model(model))
    return calib_data.sample(calib_data.load("builtin"), tokenizer, samples, seq_len)


def peer_of(text: str) -> tuple[str, Path]:
    """NAME=PYTHON of a command line: one of SCRIPTS and the interpreter that runs it."""
    name, _, python = text.partition("=")
    if name not in SCRIPTS or not python:
        raise argparse.ArgumentTypeError(f"{text}: must be NAME=PYTHON, NAME one of {', '.join(SCRIPTS)}")
    return name, Path(python).absolute()  # not resolved: a link tells the environment


def peer_command(name: str, python: Path, model: Path, windows: Path, output: Path, dtype: str) -> list[str]:
    """The command that quantizes `model` to `output` with a peer."""
    return [str(python), "-c", SCRIPTS[name], str(model), str(windows), str(output), dtype]


def checkpoint_in(output: Path) -> Path:
    """Where a peer put its checkpoint: AutoRound makes a folder in the one that it is given."""
    return output if (output / "config.json").exists() else next(output.glob("*/config.json")).parent
