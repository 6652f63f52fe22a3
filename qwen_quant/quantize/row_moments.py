"""What errors of one output do to the predictions together with errors of others: second moments of the gradients.

An error D of a weight [N, K] moves the output of a token x by D x, and the predictions by E[(g·D x)²] / 2 nats of KL
divergence, g being the gradient by the output (gradients.py). With gradients independent of the inputs that is
tr(G D H Dᵀ) / 2, G = E[g gᵀ] and H = E[x xᵀ] (Martens & Grosse 2015, arXiv:1503.05671; for quantization Tseng et al.
2025, arXiv:2505.22988). Where outputs are correlated in G, the error of one row can be made up for by others
(chains.py).

G is kept where that pays: of q, k and v, and of what is added to the hidden states. Gate and up, which are wider and
gain less (docs/quantization.md), have none, and neither have experts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import CalibrationError
from qwen_quant.quantize import scratch
from qwen_quant.quantize.calibration import Calibration
from qwen_quant.quantize.gradients import backward
from qwen_quant.spec import ModelSpec

# Tokens that gradients are taken of, for each of the hidden states' channels: G of few tokens is mostly chance.
TOKENS_FOR_EACH = 64


class RowMoments:
    """G of each linear that has one, in memory or in files."""

    def __init__(self, spec: ModelSpec, folder: Path | None = None) -> None:
        self._names, self._folder = linears(spec), folder
        self._sums: dict[str, Calibration] = {}  # of a layer
        self._kept: dict[str, Tensor] = {}

    @classmethod
    def measured(
        cls, checkpoint: Checkpoint, hidden: Tensor, seed: int = 0, folder: Path | None = None
    ) -> RowMoments:
        """From embedded windows `hidden` [samples, seq, hidden]; drawing tokens begins with `seed`. In files in
        `folder`, where one is given.

        Raises CalibrationError when activations or gradients are not finite.
        """
        found = cls(checkpoint.spec, folder)
        backward(checkpoint, hidden, found, seed, folder)
        return found

    def of(self, weight: str, device: torch.device | str = "cpu") -> Tensor | None:
        """G [N, N] of the weight [N, K] of this name, None where there is none."""
        found = self._kept.get(weight)
        return None if found is None else found.to(device)

    def measure(self, name: str, by_output: Tensor) -> Tensor | None:
        """The gradients themselves [T, N], where they are counted."""
        return by_output if name in self._names else None

    def count(self, weight: str, measured: Tensor) -> None:
        """Add gradients [T, N] to the moments of a weight."""
        if not torch.isfinite(measured.sum()):
            raise CalibrationError(f"{weight}: gradients are not finite; the checkpoint is broken")
        if weight not in self._sums:
            self._sums[weight] = Calibration(measured.shape[1], weight, measured.device, shared=True)
        self._sums[weight].add(measured)

    def layer_passed(self) -> None:
        """Set the moments of a layer aside."""
        for weight, sums in self._sums.items():
            moments = shrunk(sums.hessian, sums.n_tokens).cpu()
            self._kept[weight] = scratch.copy(moments, self._folder) if self._folder else moments
        self._sums = {}
        scratch.let_go()


def linears(spec: ModelSpec) -> tuple[str, ...]:
    """The names, within a layer, of those whose outputs' moments are kept."""
    return (*spec.names.qkv, spec.names.output, spec.names.mlp[-1], "mlp.shared_expert.down_proj")


def shrunk(moments: Tensor, tokens: int) -> Tensor:
    """Moments [N, N] of few tokens with less trust in what is off the diagonal, where chance adds N / tokens."""
    share = tokens / (tokens + len(moments))
    return share * moments + (1 - share) * torch.diag(moments.diagonal())


def gradient_windows(spec: ModelSpec, samples: int, seq_len: int) -> int:
    """Of how many of the first windows the gradients are taken."""
    return min(samples, -(-TOKENS_FOR_EACH * spec.hidden_size // seq_len))
