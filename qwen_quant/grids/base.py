"""What every affine grid shares: groups along K, rounding, and the search for scales.

A weight matrix W [N, K] is cut into groups of `group_size` columns. Each group of a row has a scale and an
offset; a code q in 0 … max_code stands for a value that depends on the grid. Functions take NumPy arrays or
torch tensors alike (array API), so the solver runs them on any device and the exporters need no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

from qwen_quant import _core

Array = Any  # a NumPy array or a torch tensor

CHUNK = 1 << 18  # weights searched at once: the temporaries stay in the second-level cache
FP16_TINY = 2.0**-24


def namespace(array: Array) -> Any:
    """The array API namespace (NumPy's or torch's) of `array`."""
    return array_api_compat.array_namespace(array)


def on_cpu(array: Array) -> bool:
    """Whether NumPy can see `array`, as it can see a torch tensor on the CPU."""
    return str(array_api_compat.device(array)) == "cpu"


def to_fp16(x: Array) -> Array:
    """float32 values as they are after a trip through FP16, saturating instead of overflowing."""
    xp = namespace(x)
    half = xp.astype(xp.clip(x, -65504.0, 65504.0), xp.float16)
    return xp.astype(half, xp.float32)


def fp16_scale(x: Array) -> Array:
    """`to_fp16` for scales: what would be 0 becomes the smallest positive FP16, so that 1 / scale exists."""
    xp = namespace(x)
    half = to_fp16(x)
    return xp.where(half == 0, xp.full_like(half, FP16_TINY), half)


def ratio(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, and 0 where the denominator is 0."""
    xp = namespace(numerator)
    zero = denominator == 0
    return xp.where(
        zero, xp.zeros_like(numerator), numerator / xp.where(zero, xp.ones_like(denominator), denominator)
    )


@dataclass
class Scales:
    """Parameters of each group as a reader will decode them, FP32: `scale` and `offset`, both [N, G]."""

    scale: Array
    offset: Array


@dataclass
class Sums:
    """Sums over each group for some scales of it, all [M, C], weighted by importance. A level is what a scale
    multiplies: for given levels a group's squared error is a quadratic form in its scale and offset."""

    weight: Array  # of the importance itself
    value: Array  # of the weights w
    level: Array
    square: Array  # of level^2
    product: Array  # of level * w


@dataclass
class QuantizedTensor:
    """A weight matrix on its grid: codes uint8 [N, K] and the scales of its groups.

    `group_index` [K] names the group of each column where groups are not in order (act-order), else None.
    """

    grid: AffineGrid
    codes: Array
    scales: Scales
    group_index: Array | None = None

    def decode(self) -> Array:
        """The weights a reader sees, float32 [N, K]."""
        return self.grid.decode(
            self.codes, self.grid.spread(self.scales, self.codes.shape[1], self.group_index)
        )

    def rows(self, which: slice) -> QuantizedTensor:
        """Some of the rows, nothing copied."""
        scales = Scales(self.scales.scale[which], self.scales.offset[which])
        return QuantizedTensor(self.grid, self.codes[which], scales, self.group_index)


def joined(scales: Sequence[Scales]) -> Scales:
    """Scales to try, each [M, 1], as one [M, C]."""
    xp = namespace(scales[0].scale)
    return Scales(
        xp.concat([trial.scale for trial in scales], axis=1),
        xp.concat([trial.offset for trial in scales], axis=1),
    )


class AffineGrid(ABC):
    """A grid on which each group's values are an affine function of the code."""

    name: str
    bits: int
    group_size: int  # columns per group; -1 for the whole row
    # Which formula `value` is, by its name in csrc/grid_kernels.h.
    rule: str
    # With a code book: the level of each code, and the nearest code for each half step from the first level on.
    levels: Sequence[float] = ()
    nearest_codes: Sequence[float] = ()

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def compiled(self) -> _core.GridCodes:
        """The same formula for the compiled loops."""
        return _core.GridCodes(self.rule, self.max_code, self.levels, self.nearest_codes)

    @property
    def groups_per_block(self) -> int:
        """Groups side by side whose scales can only be chosen together."""
        return 1

    @property
    @abstractmethod
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included (whole-row scales count as none)."""

    @abstractmethod
    def value(self, codes: Array, scale: Array, offset: Array) -> Array:
        """The decoded float32 value of float32 `codes`, elementwise."""

    @abstractmethod
    def level(self, codes: Array, offset: Array) -> Array:
        """What the scale multiplies, elementwise."""

    @abstractmethod
    def position(self, w: Array, scale: Array, offset: Array) -> Array:
        """Where `w` lies on the code axis, before rounding, elementwise."""

    @abstractmethod
    def plain(self, groups: Array) -> Scales:
        """Scales that cover the extremes of groups [M, group_size] (round-to-nearest), each [M, 1]."""

    @abstractmethod
    def search(self, groups: Array, importance: Array) -> Scales:
        """Scales [M, 1] that minimise sum(importance * (w - decoded)^2) of groups [M, group_size]."""

    @abstractmethod
    def refit(self, sums: Sums, scales: Scales) -> Scales:
        """Stored scales that are least squares for the levels which `scales` led to, all [M, 1]."""

    def columns_per_group(self, k: int) -> int:
        """The group size for a matrix of `k` columns."""
        return k if self.group_size == -1 else self.group_size

    def n_groups(self, k: int) -> int:
        """How many groups `k` columns make; the last may be short."""
        return -(-k // self.columns_per_group(k))

    def round(self, w: Array, scale: Array, offset: Array) -> Array:
        """The nearest code of each weight, as float32."""
        xp = namespace(w)
        return xp.clip(xp.round(self.position(w, scale, offset)), 0.0, float(self.max_code))

    def spread(self, scales: Scales, k: int, group_index: Array | None = None) -> Scales:
        """Per-column scales [N, K] from per-group ones [N, G]."""
        xp = namespace(scales.scale)
        size = self.columns_per_group(k)
        if group_index is None:
            group_index = xp.arange(k, device=array_api_compat.device(scales.scale)) // size
        return Scales(xp.take(scales.scale, group_index, axis=1), xp.take(scales.offset, group_index, axis=1))

    def encode(self, w: Array, columns: Scales) -> Array:
        """Codes uint8 [N, K] of weights [N, K] for per-column scales [N, K]."""
        xp = namespace(w)
        return xp.astype(self.round(w, columns.scale, columns.offset), xp.uint8)

    def decode(self, codes: Array, columns: Scales) -> Array:
        """Weights float32 [N, K] of codes [N, K] for per-column scales [N, K]."""
        xp = namespace(codes)
        return self.value(xp.astype(codes, xp.float32), columns.scale, columns.offset)

    def fit(self, w: Array, importance: Array | None = None) -> Scales:
        """Scales [N, G] for weights [N, K].

        Without `importance` they cover each group's extremes, as plain rounding does. With it ([K], diag of the
        Hessian, or [N, K] where rows differ in theirs) a search minimises sum(importance * (w - decoded)^2) in
        each group over the stored scales.
        """
        xp = namespace(w)
        n, k = w.shape
        size, n_groups = self.columns_per_group(k), self.n_groups(k)
        rows = max(1, CHUNK // k)
        parts = []
        for start in range(0, n, rows):
            groups = self._cut(w[start : start + rows, :], size, n_groups)
            if importance is None:
                parts.append(self.plain(groups))
            else:
                mine = xp.broadcast_to(importance, (n, k))[start : start + rows, :]
                weights = self._cut(mine, size, n_groups, weigh_filling=False)
                parts.append(self.search(groups, weights))
        scale = xp.reshape(xp.concat([part.scale for part in parts], axis=0), (n, n_groups))
        offset = xp.reshape(xp.concat([part.offset for part in parts], axis=0), (n, n_groups))
        return Scales(scale, offset)

    def plain_rounding(self, w: Array) -> QuantizedTensor:
        """Round-to-nearest without calibration: the baseline."""
        return self._rounded(w, self.fit(w))

    def uncalibrated(self, w: Array) -> QuantizedTensor:
        """Rounding to nearest when nothing is known about the inputs."""
        return self.plain_rounding(w)

    def searched_rounding(self, w: Array, importance: Array) -> QuantizedTensor:
        """Round-to-nearest on the scales that `fit` finds for `importance`."""
        return self._rounded(w, self.fit(w, importance))

    def _rounded(self, w: Array, scales: Scales) -> QuantizedTensor:
        return QuantizedTensor(self, self.encode(w, self.spread(scales, w.shape[1])), scales)

    def _cut(self, w: Array, size: int, n_groups: int, weigh_filling: bool = True) -> Array:
        """[N, K] as [N * G, size]; a short last group is filled with its own last column (no new extremes).

        For importances `weigh_filling` is False: the filling then counts for nothing.
        """
        xp = namespace(w)
        n, k = w.shape
        short = n_groups * size - k
        if short:
            filling = xp.broadcast_to(w[:, k - 1 :], (n, short))
            w = xp.concat([w, filling if weigh_filling else xp.zeros_like(filling)], axis=1)
        return xp.reshape(w, (n * n_groups, size))

    def error(self, groups: Array, importance: Array, scales: Scales) -> Array:
        """Weighted squared errors [M, C] of groups [M, group_size] after rounding, for C scales of each [M, C]."""
        xp = namespace(groups)
        if on_cpu(groups):
            return xp.asarray(_core.group_errors(self.compiled, *_arrays(groups, importance, scales)))

        def of(scale: Array, offset: Array) -> Array:
            gap = groups - self.value(self.round(groups, scale, offset), scale, offset)
            return xp.sum(importance * gap * gap, axis=1)

        return xp.stack([of(scale, offset) for scale, offset in _each(scales)], axis=1)

    def sums(self, groups: Array, importance: Array, scales: Scales) -> Sums:
        """Sums over groups [M, group_size] rounded on C scales of each [M, C]."""
        xp = namespace(groups)
        if on_cpu(groups):
            return Sums(*xp.asarray(_core.group_sums(self.compiled, *_arrays(groups, importance, scales))))

        def of(scale: Array, offset: Array) -> Array:
            level = self.level(self.round(groups, scale, offset), offset)
            factors = (xp.ones_like(groups), groups, level, level * level, level * groups)
            return xp.stack([xp.sum(importance * factor, axis=1) for factor in factors])  # [5, M]

        return Sums(*xp.stack([of(scale, offset) for scale, offset in _each(scales)], axis=-1))


def _arrays(groups: Array, importance: Array, scales: Scales) -> list[np.ndarray]:
    """As the compiled loops want them; the arrays lie on the CPU."""
    arrays = (groups, importance, scales.scale, scales.offset)
    return [np.ascontiguousarray(np.asarray(x), dtype=np.float32) for x in arrays]


def _each(scales: Scales) -> Iterator[tuple[Array, Array]]:
    """Scale and offset [M, 1], one of C after the other."""
    for c in range(scales.scale.shape[1]):
        yield scales.scale[:, c : c + 1], scales.offset[:, c : c + 1]


class CentredGrid(AffineGrid):
    """A grid whose offset is the code of zero: w = scale * (q - offset)."""

    rule = "centred"

    def value(self, codes: Array, scale: Array, offset: Array) -> Array:
        return scale * self.level(codes, offset)

    def level(self, codes: Array, offset: Array) -> Array:
        return codes - offset

    def position(self, w: Array, scale: Array, offset: Array) -> Array:
        return w / scale + offset
