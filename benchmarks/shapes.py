"""Random checkpoints in the shapes of released models, for measurements of time and memory.

    python benchmarks/shapes.py qwen3-30b-a3b -o DIR [--layers N] [--vocab-size V]

Weights are random BF16, written in shards with a few rows in memory; the large models are cut to two layers unless
`--layers` says otherwise. The tokenizer is the bundled one, so `--vocab-size` must be at least its size.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from qwen_quant.checkpoint import INDEX, SINGLE, resolve_model
from qwen_quant.safetensors import Planned, SafetensorsWriter, f32_to_bf16
from qwen_quant.spec import ModelSpec, TensorInfo

COMMON = {
    "hidden_act": "silu",
    "num_hidden_layers": 28,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "bos_token_id": 4091,
    "eos_token_id": 4093,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
}
QWEN3 = COMMON | {
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "attention_bias": False,
    "vocab_size": 151936,
}
QWEN3_SMALL = QWEN3 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
SHAPES = {
    "qwen3-0.6b": QWEN3_SMALL | {"hidden_size": 1024, "intermediate_size": 3072},
    "qwen3-1.7b": QWEN3_SMALL | {"hidden_size": 2048, "intermediate_size": 6144},
    "qwen2.5-7b": COMMON
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
    "qwen3-30b-a3b": QWEN3
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
}
LARGE = ("qwen2.5-7b", "qwen3-30b-a3b")  # cut to LARGE_LAYERS unless asked otherwise
LARGE_LAYERS = 2
SHARD_BYTES = 2 << 30
ROWS = 4096  # rows made at once


def random_rows(info: TensorInfo, rng: np.random.Generator):  # type: ignore[no-untyped-def]
    """A tensor in pieces along its first dimension, BF16, scaled so that activations stay near 1."""
    for start in range(0, info.shape[0], ROWS):
        shape = (min(ROWS, info.shape[0] - start), *info.shape[1:])
        if info.role == "norm":
            yield f32_to_bf16(np.ones(shape, np.float32))
            continue
        std = 0.02 if info.role in ("embedding", "bias") else 0.5 * info.shape[-1] ** -0.5
        yield f32_to_bf16(rng.standard_normal(shape, dtype=np.float32) * np.float32(std))


def config_of(shape: str, layers: int | None = None, vocab_size: int | None = None) -> dict:
    """The config.json of a shape, whole or cut."""
    config = dict(SHAPES[shape])
    if layers is None and shape in LARGE:
        layers = LARGE_LAYERS
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    config["vocab_size"] = vocab_size or config["vocab_size"]
    return config


def shards_of(infos: list[TensorInfo]) -> list[list[TensorInfo]]:
    """The tensors in order, none of the shards above SHARD_BYTES unless one tensor is."""
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        nbytes = Planned(info.name, "BF16", info.shape).nbytes
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += nbytes
    return shards


def write(config: dict, folder: Path, seed: int = 0) -> None:
    """Write the checkpoint shard by shard, a few rows at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(resolve_model("reference") / name, folder / name)
    rng = np.random.default_rng(seed)
    shards = shards_of(ModelSpec.from_config(config).tensors())
    placed: dict[str, str] = {}
    for number, infos in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        placed |= dict.fromkeys((info.name for info in infos), name)
        with SafetensorsWriter(folder / name, [Planned(i.name, "BF16", i.shape) for i in infos]) as out:
            for info in infos:
                out.write_rows(info.name, random_rows(info, rng))
    if len(shards) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab-size", type=int)
    options = parser.parse_args()
    write(config_of(options.shape, options.layers, options.vocab_size), options.output)


if __name__ == "__main__":
    main()
