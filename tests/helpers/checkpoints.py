"""Checkpoints that tests make: what they say of themselves, and changing them afterwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qwen_quant.safetensors import Planned, SafetensorsFile, SafetensorsWriter

# What makes a tiny checkpoint one with experts.
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


def rewrite(folder: Path, changed: dict[str, np.ndarray | None]) -> None:
    """Replace tensors of a single-file checkpoint, add them, or with None drop them."""
    path = folder / "model.safetensors"
    file = SafetensorsFile(path)
    arrays = {name: file.read_raw(name).copy() for name in file.entries}
    kinds = {np.dtype("<u2"): "BF16", np.dtype("<i4"): "I32", np.dtype("<f2"): "F16", np.dtype("<f4"): "F32"}
    arrays.update({name: array for name, array in changed.items() if array is not None})
    for name in [name for name, array in changed.items() if array is None]:
        del arrays[name]
    target = folder / "new"
    with SafetensorsWriter(
        target, [Planned(n, kinds[a.dtype], a.shape) for n, a in arrays.items()]
    ) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    target.replace(path)
