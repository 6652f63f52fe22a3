"""Logits of a checkpoint that need not fit into memory: one decoder layer at a time, all texts through it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.model import load_layer, new_rotary
from qwen_quant.model.transformer import RMSNorm
from qwen_quant.names import HEAD


@torch.inference_mode()
def streamed_logits(checkpoint: Checkpoint, windows: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Logits [n, T, V] of the reference model over token windows [n, T], float32 over stored or decoded weights.

    Memory holds a layer, the hidden states and the logits.
    """
    spec = checkpoint.spec
    embedding = f"{spec.names.embedding}.weight"
    used, where = np.unique(windows, return_inverse=True)
    rows = checkpoint.source.read_rows(embedding, used)
    hidden = torch.from_numpy(rows[where.reshape(windows.shape)])  # [n, T, hidden]
    table = new_rotary(spec)(0, windows.shape[1])
    for index in range(spec.num_hidden_layers):
        hidden = load_layer(checkpoint, index)(hidden, table)
    norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
    norm.weight.data = torch.from_numpy(checkpoint.read(f"{spec.names.norm}.weight"))
    hidden = norm(hidden)
    head = embedding if spec.tie_word_embeddings else f"{HEAD}.weight"
    found = np.empty((*windows.shape, spec.vocab_size), dtype=np.float32)
    start = 0
    for part in checkpoint.source.chunks(head):  # [rows, hidden]
        found[..., start : start + len(part)] = (hidden @ torch.from_numpy(part).T).numpy()
        start += len(part)
    return found
