"""Logits of a checkpoint that need not fit into memory: one decoder layer at a time, all texts through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.model import new_rotary
from qwen_quant.model.transformer import RMSNorm
from qwen_quant.names import HEAD
from qwen_quant.quantize.heap import give_back_memory
from qwen_quant.quantize.layer_run import LayerRun
from qwen_quant.quantize.recipe import Recipe

HEAD_ROWS = 2048  # of the head at once: what runs beside it leaves little room


def streamed_logits(
    checkpoint: Checkpoint,
    windows: npt.NDArray[np.int32],
    advance: Callable[[float, str], None] = lambda amount, note: None,
) -> Iterator[npt.NDArray[np.float32]]:
    """Logits [T, V] of the reference model over each of the token windows [n, T], float32 over stored or decoded
    weights.

    All layers have run when this returns, each of them told to `advance`; the head runs for one window at a time.
    Memory holds a layer, of experts a few at a time, then the hidden states and one window's logits.
    """
    hidden = _hidden_states(checkpoint, windows, advance)
    return (_head(checkpoint, states) for states in hidden)


@torch.inference_mode()
def _hidden_states(
    checkpoint: Checkpoint, windows: npt.NDArray[np.int32], advance: Callable[[float, str], None]
) -> torch.Tensor:
    """Outputs of the final norm [n, T, hidden]."""
    spec = checkpoint.spec
    used, where = np.unique(windows, return_inverse=True)
    rows = checkpoint.source.read_rows(f"{spec.names.embedding}.weight", used)
    hidden = torch.from_numpy(rows[where.reshape(windows.shape)])  # [n, T, hidden]
    table = new_rotary(spec)(0, windows.shape[1])
    for index in range(spec.num_hidden_layers):
        # The quantizer's way through a layer, which reads experts as they are needed; nothing is quantized.
        run = LayerRun(checkpoint, index, lambda info: None, Recipe(), hidden.device)
        run.carry(hidden, table)
        del run
        give_back_memory()
        advance(1, f"layer {index}")
    norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
    norm.weight.data = torch.from_numpy(checkpoint.read(f"{spec.names.norm}.weight"))
    return norm(hidden)


@torch.inference_mode()
def _head(checkpoint: Checkpoint, hidden: torch.Tensor) -> npt.NDArray[np.float32]:
    """Logits [T, V] of hidden states [T, hidden]."""
    spec = checkpoint.spec
    name = f"{spec.names.embedding if spec.tie_word_embeddings else HEAD}.weight"
    found = np.empty((len(hidden), spec.vocab_size), dtype=np.float32)
    for start in range(0, spec.vocab_size, HEAD_ROWS):
        rows = slice(start, min(start + HEAD_ROWS, spec.vocab_size))
        found[:, rows] = (hidden @ torch.from_numpy(checkpoint.source.read(name, rows)).T).numpy()
    return found
