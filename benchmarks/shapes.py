"""Random checkpoints in the shapes of released models, for measurements of time and memory.

    python benchmarks/shapes.py qwen3-0.6b -o DIR [--layers N] [--vocab-size V]

Weights are random BF16; the tokenizer is the bundled one, so `--vocab-size` must be at least its size.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from qwen_quant.checkpoint import resolve_model
from qwen_quant.safetensors import Planned, SafetensorsWriter, f32_to_bf16
from qwen_quant.spec import ModelSpec, TensorInfo

COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 4091,
    "eos_token_id": 4093,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SHAPES = {
    "qwen3-0.6b": COMMON | {"hidden_size": 1024, "intermediate_size": 3072},
    "qwen3-1.7b": COMMON | {"hidden_size": 2048, "intermediate_size": 6144},
}
ROWS = 4096  # rows made at once


def random_rows(info: TensorInfo, rng: np.random.Generator):  # type: ignore[no-untyped-def]
    """A tensor in pieces along its first dimension, BF16, scaled so that activations stay near 1."""
    for start in range(0, info.shape[0], ROWS):
        shape = (min(ROWS, info.shape[0] - start), *info.shape[1:])
        if info.role == "norm":
            yield f32_to_bf16(np.ones(shape, np.float32))
            continue
        std = 0.02 if info.role == "embedding" else 0.5 * info.shape[-1] ** -0.5
        yield f32_to_bf16(rng.standard_normal(shape, dtype=np.float32) * np.float32(std))


def write(config: dict, folder: Path, seed: int = 0) -> None:
    """Write the checkpoint tensor by tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(resolve_model("reference") / name, folder / name)
    rng = np.random.default_rng(seed)
    infos = ModelSpec.from_config(config).tensors()
    with SafetensorsWriter(
        folder / "model.safetensors", [Planned(i.name, "BF16", i.shape) for i in infos]
    ) as out:
        for info in infos:
            out.write_rows(info.name, random_rows(info, rng))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab-size", type=int)
    options = parser.parse_args()
    config = dict(SHAPES[options.shape])
    if options.layers:
        config["num_hidden_layers"] = options.layers
    if options.vocab_size:
        config["vocab_size"] = options.vocab_size
    write(config, options.output)


if __name__ == "__main__":
    main()
