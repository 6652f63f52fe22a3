"""A GGUF file of a given size: the type of each tensor by the loss that was measured for it."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import gguf

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.exporters.gguf import FilePlan, plan_file
from qwen_quant.exporters.gguf_metadata import add_metadata, architecture
from qwen_quant.exporters.gguf_mixes import ALIASES
from qwen_quant.exporters.gguf_tensors import Choice, gguf_name
from qwen_quant.exporters.gguf_types import Chooser, TypeOptions, fitting
from qwen_quant.grids.base import AffineGrid
from qwen_quant.grids.gguf import GRIDS, gguf_grid
from qwen_quant.quantize.budget import Option, spend
from qwen_quant.spec import TensorInfo
from qwen_quant.tokenizer import Tokenizer

# From 2.6 to 8.5 bits; the types left out store as many bits with more loss.
MENU = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
BASE = "Q4_K_M"  # decides nothing but the types of vectors
ALIGNMENT = 32  # bytes to which tensors are padded
Losses = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class BudgetedFile:
    """The plan of a file, the options that make it, and the divergence that its losses add up to, in nats."""

    plan: FilePlan
    options: TypeOptions
    expected_kld: float


class Budget:
    """The choices there are for a checkpoint; types that `options` ask for are not open."""

    def __init__(self, checkpoint: Checkpoint, options: TypeOptions) -> None:
        self.checkpoint, self.options = checkpoint, options
        self.file = plan_file(checkpoint, BASE, options)
        chooser = Chooser(checkpoint.spec, BASE, options)
        self._open = {
            member.name: choice
            for choice in self.file.choices
            if choice.type in GRIDS and chooser.asked(gguf_name(choice.info)) is None
            for member in choice.stored
        }

    def menu(self, info: TensorInfo) -> list[AffineGrid]:
        """The grids that a tensor of the checkpoint may lie on."""
        choice = self._open.get(info.name)
        return [] if choice is None else [gguf_grid(name) for name in _types(choice)]

    def bytes_for(self, bits_per_weight: float) -> int:
        """The bytes of all tensors together at `bits_per_weight`, which counts norms and biases too."""
        weights = sum(math.prod(info.shape) for info in self.checkpoint.spec.tensors())
        return int(bits_per_weight / 8 * weights)

    def header_bytes(self, tokenizer: Tokenizer) -> int:
        """What a file holds before its tensors, and some room for the recipe and the check."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "header.gguf"
            writer = gguf.GGUFWriter(path, architecture(self.checkpoint.spec))
            add_metadata(writer, self.checkpoint, tokenizer, BASE, {})
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
            names = sum(len(gguf_name(choice.info)) + 64 for choice in self.file.choices)
            return path.stat().st_size + names + (4 << 10)

    def check(self, nbytes: int) -> None:
        """Raise UsageError when `nbytes` do not hold the smallest types."""
        self.spend({name: dict.fromkeys(GRIDS, 0.0) for name in self._open}, nbytes)

    def spend(self, losses: Losses, nbytes: int) -> BudgetedFile:
        """The file of at most `nbytes` bytes of tensors that loses least. Raises UsageError when none is so small."""
        choices = {choice.info.name: choice for choice in self._open.values()}
        fixed = sum(_padded(c.nbytes) for c in self.file.choices if c.info.name not in choices)
        menus = {name: _options(choice, losses) for name, choice in choices.items()}
        chosen = spend(menus, nbytes - fixed)
        assigned = {gguf_name(choices[name].info): option.type for name, option in chosen.items()}
        options = replace(self.options, assigned=assigned)
        plan = plan_file(self.checkpoint, _label(chosen.values()), options)
        return BudgetedFile(plan, options, sum(option.loss for option in chosen.values()))


def _options(choice: Choice, losses: Losses) -> list[Option]:
    """The types for a tensor, a stack of experts with the losses of all."""
    return [
        Option(
            kind,
            _padded(replace(choice, type=kind).nbytes),
            sum(losses[member.name][kind] for member in choice.stored),
        )
        for kind in _types(choice)
    ]


def _types(choice: Choice) -> list[str]:
    """The menu for a tensor's shape."""
    fitted = (fitting(kind, choice.info.shape[-1]) for kind in MENU)
    return list(dict.fromkeys(kind for kind in fitted if kind in GRIDS))


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _label(chosen: Iterable[Option]) -> str:
    """The file type to name: that of most bytes."""
    sizes = Counter[str]()
    for option in chosen:
        sizes[option.type] += option.nbytes
    most = max(sorted(sizes), key=lambda kind: sizes[kind])
    return ALIASES.get(most, most)
