"""Finished layers kept on disk, so that a killed run goes on where it stopped.

One safetensors file per decoder layer holds its codes and scales, and in its metadata the reports and three hashes:
of the recipe, of the hidden states that entered the layer (so of the data and all earlier layers), and of the
layer's full-precision weights. A layer is taken from disk only when all three are what they are now. The losses that
were measured for a budget are kept beside the layers in the same way.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_quant.errors import CalibrationError
from qwen_quant.files import atomic_file
from qwen_quant.grids.base import AffineGrid, QuantizedTensor, Scales
from qwen_quant.quantize import scratch
from qwen_quant.quantize.layer import LinearReport, QuantizedLayer
from qwen_quant.safetensors import Planned, SafetensorsFile, SafetensorsWriter, storage_dtype

if TYPE_CHECKING:
    from torch import Tensor

Fingerprint = dict[str, str]
Losses = dict[str, dict[str, float]]  # nats, by tensor and grid
INPUTS, WEIGHTS, RECIPE = "calibration data", "weights", "recipe"


def fingerprint(
    hidden: Tensor, weights: Iterable[tuple[str, np.ndarray]], recipe: Mapping[str, Any]
) -> Fingerprint:
    """Hashes of all that decides a result: hidden states [samples, seq, hidden] or what else went in, the `weights`
    by name, recipe."""
    digest = hashlib.sha256()
    for name, value in weights:
        digest.update(name.encode())
        digest.update(value.data)
    inputs = hashlib.sha256()
    for part in hidden:
        inputs.update(part.cpu().numpy().data)
        scratch.let_go()
    return {
        RECIPE: hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
        INPUTS: inputs.hexdigest(),
        WEIGHTS: digest.hexdigest(),
    }


class LayerStore:
    """The finished layers of one run, in a folder that the caller removes at the end with `discard`."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def _path(self, layer: int) -> Path:
        return self.folder / ("outer.safetensors" if layer < 0 else f"layer-{layer:05d}.safetensors")

    def save(self, result: QuantizedLayer, marks: Fingerprint) -> None:
        """Keep a finished layer; it is on disk whole or not at all."""
        arrays: dict[str, np.ndarray] = {}
        for name, tensor in result.tensors.items():
            arrays[f"{name}.codes"] = tensor.codes
            arrays[f"{name}.scale"] = tensor.scales.scale
            arrays[f"{name}.offset"] = tensor.scales.offset
            if tensor.group_index is not None:
                arrays[f"{name}.group_index"] = tensor.group_index
        planned = [Planned(name, storage_dtype(array), array.shape) for name, array in arrays.items()]
        metadata = {
            "marks": json.dumps(marks),
            "reports": json.dumps([asdict(report) for report in result.reports]),
            "parts": json.dumps(result.parts),
        }
        with (
            atomic_file(self._path(result.layer)) as path,
            SafetensorsWriter(path, planned, metadata) as writer,
        ):
            for name, array in arrays.items():
                writer.write(name, array)

    def load(self, layer: int, grids: Mapping[str, AffineGrid], marks: Fingerprint) -> QuantizedLayer | None:
        """A kept layer whose tensors lie on `grids`, None when there is none.

        Raises CalibrationError when it was made from other weights, data, or another recipe.
        """
        path = self._path(layer)
        if not path.exists():
            return None
        file = SafetensorsFile(path)
        self._check(json.loads(file.metadata.get("marks", "{}")), marks)
        parts = json.loads(file.metadata.get("parts", "{}"))
        result = QuantizedLayer(layer, seconds=sum(parts.values()), parts=parts)
        result.reports = [LinearReport(**fields) for fields in json.loads(file.metadata["reports"])]
        for name, grid in grids.items():
            index = f"{name}.group_index"
            result.tensors[name] = QuantizedTensor(
                grid,
                file.read_raw(f"{name}.codes"),
                Scales(file.read_raw(f"{name}.scale"), file.read_raw(f"{name}.offset")),
                file.read_raw(index) if index in file.entries else None,
            )
        return result

    def _check(self, kept: Mapping[str, str], marks: Fingerprint) -> None:
        changed = [what for what in (RECIPE, INPUTS, WEIGHTS) if kept.get(what) != marks[what]]
        if changed:
            raise CalibrationError(
                f"{self.folder}: was begun with another {changed[0]}; run without --resume to start again"
            )

    @property
    def _losses(self) -> Path:
        return self.folder / "losses.json"

    def save_losses(self, losses: Losses, marks: Fingerprint) -> None:
        """Keep what was measured for a budget."""
        with atomic_file(self._losses) as path:
            path.write_text(json.dumps({"marks": marks, "losses": losses}), encoding="utf-8")

    def load_losses(self, marks: Fingerprint) -> Losses | None:
        """What was kept, None when nothing was. Raises as `load`."""
        if not self._losses.exists():
            return None
        found = json.loads(self._losses.read_text(encoding="utf-8"))
        self._check(found["marks"], marks)
        return dict(found["losses"])

    def discard(self) -> None:
        """Remove what was kept."""
        shutil.rmtree(self.folder, ignore_errors=True)
