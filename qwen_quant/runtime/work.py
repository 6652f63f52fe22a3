"""What a token costs: the bytes of weights that decoding reads, the operations of the linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from qwen_quant.runtime.gguf import GGUFFile

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"


@dataclass(frozen=True)
class Work:
    """Of one token.

    `weight_bytes` counts each weight that a step of one token reads: the head (the embedding when they are
    tied, of which one row is looked up besides), and of the experts those that the token goes through.
    `operations` are the multiplications and additions, 2 · N · K for each W [N, K] of a layer, without the
    head, which a prompt needs once.
    """

    weight_bytes: int
    operations: int


def work_per_token(file: GGUFFile) -> Work:
    """What the tensors of `file` cost."""
    architecture = file.metadata["general.architecture"]
    count = file.metadata.get(f"{architecture}.expert_count", 0)
    used = file.metadata.get(f"{architecture}.expert_used_count", 0)
    head = HEAD if HEAD in file.tensors else EMBEDDING
    n_bytes = operations = Fraction(0)
    for name, tensor in file.tensors.items():
        if name == EMBEDDING != head:
            continue
        share = Fraction(used, count) if "_exps." in name else Fraction(1)
        n_bytes += share * tensor.nbytes
        if name != head and len(tensor.shape) > 1:
            operations += 2 * share * int(np.prod(tensor.shape, dtype=np.int64))
    return Work(round(n_bytes), round(operations))
