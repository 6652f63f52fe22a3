"""The safetensors files of a GPTQ checkpoint: which tensor lies where, all of them open at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_quant.checkpoint import INDEX, SINGLE
from qwen_quant.safetensors import Planned, SafetensorsWriter


def shards_of(planned: list[Planned], limit: int) -> dict[str, list[Planned]]:
    """File names and their tensors: filled in order, none above `limit` bytes unless one tensor is."""
    groups: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    total = len(groups)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": group for i, group in enumerate(groups, 1)}


class ShardSet:
    """All shards open for writing at once; `writer(name)` is the one that holds a tensor."""

    def __init__(self, folder: Path, shards: dict[str, list[Planned]]) -> None:
        self._writers = {
            shard: SafetensorsWriter(folder / shard, tensors) for shard, tensors in shards.items()
        }
        self._shard_of = {t.name: shard for shard, tensors in shards.items() for t in tensors}

    def writer(self, name: str) -> SafetensorsWriter:
        return self._writers[self._shard_of[name]]

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for writer in self._writers.values():
            writer.__exit__(kind, error, trace)


def write_index(folder: Path, shards: dict[str, list[Planned]]) -> None:
    """model.safetensors.index.json, where there are several files."""
    if len(shards) == 1:
        return
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    weight_map = {tensor.name: shard for shard, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
