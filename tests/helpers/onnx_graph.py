"""An exported graph on plain onnxruntime, fed as Optimum feeds it: past in, present out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort


def graph_of(folder: Path) -> Path:
    """The graph in an exported folder."""
    return next((folder / "onnx").glob("*.onnx"))


class OnnxGraph:
    """Runs tokens through the graph and keeps what it has read; `batch` texts at a time."""

    def __init__(self, folder: Path, batch: int = 1) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        # What onnxruntime makes of DequantizeLinear would round activations to 8 bits otherwise.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        self.session = ort.InferenceSession(graph_of(folder), options, providers=["CPUExecutionProvider"])
        self.caches: dict[str, Any] = {
            value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), dtype=np.float32)
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values")
        }
        self.read = 0

    def __call__(self, tokens: np.ndarray, **more: Any) -> np.ndarray:
        """Logits [batch, new, vocab] of tokens [batch, new]."""
        batch, new = tokens.shape
        feeds = {
            "input_ids": tokens.astype(np.int64),
            "attention_mask": np.ones((batch, self.read + new), dtype=np.int64),
            "position_ids": np.tile(np.arange(self.read, self.read + new), (batch, 1)),
            **self.caches,
            **more,
        }
        names = [value.name for value in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(names, feeds), strict=True))
        logits = found.pop("logits")
        self.caches = {name.replace("present", "past_key_values"): value for name, value in found.items()}
        self.read += new
        return np.asarray(logits)
