"""Scales of GGUF's super-blocks: groups of 16 or 32 weights whose scales are small integers times an FP16 number.

A super-block is 256 weights. The scale of its group j is d * scale_j, the minimum (where there is one)
dmin * minimum_j: what is searched are these integers and d, dmin together, never free scales that are rounded later.

The search alternates between the codes and the scales. For given codes the weighted squared error is a quadratic
form in each group's scale and offset. Written around its own minimum it needs a few sums of each group, so that many
choices of d and dmin are compared without touching the weights again.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from qwen_quant.grids.base import (
    FP16_TINY,
    Array,
    QuantizedTensor,
    Scales,
    Sums,
    fp16_scale,
    joined,
    namespace,
    ratio,
)
from qwen_quant.grids.blocks import BlockGrid, from_half

SUPER_BLOCK = 256
ALTERNATIONS = 3  # of codes and stored scales
# Super-scales tried, relative to the one that gives the largest group's scale the largest integer.
NEIGHBOURS = (0.9, 0.94, 0.97, 1.0, 1.03, 1.07)


def total(x: Array) -> Array:
    """Sums over the last axis, which stays."""
    return namespace(x).sum(x, axis=-1, keepdims=True)


def super_scales(products: np.ndarray, limits: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """FP16 numbers d [N, B] and integers within `limits` [N, B, S] whose products are `products` [N, B, S].

    A product of FP16's 11 bits with an integer of up to 8 is exact in FP32, so its factors can be found again: d is the
    products' greatest common divisor, or the largest part of it that is an FP16 number.
    Raises ValueError when the products are not of this form.
    """
    units = np.rint(products.astype(np.float64) / FP16_TINY).astype(np.int64)
    common = np.gcd.reduce(units, axis=-1)  # [N, B]
    found = np.zeros(common.shape, dtype=np.float32)
    for part in range(1, max(map(abs, limits)) + 1):
        trial = (common // part * FP16_TINY).astype(np.float32)
        good = (found == 0) & (common % part == 0) & (np.minimum(trial, 65504).astype("<f2") == trial)
        found[good] = trial[good]
        if (found != 0).all():
            break
    d = np.where(found == 0, np.float32(FP16_TINY), found)
    ints = np.rint(products / d[..., None])
    turned = (ints.max(-1) > limits[1]) | (ints.min(-1) < limits[0])
    d, ints = np.where(turned, -d, d), np.where(turned[..., None], -ints, ints)
    if ints.max() > limits[1] or ints.min() < limits[0] or not np.array_equal(d[..., None] * ints, products):
        raise ValueError("scales are not integers times an FP16 number")
    return d, ints.astype(np.int64)


class SuperBlockGrid(BlockGrid):
    """A grid whose groups of `group_size` share the FP16 numbers of a super-block."""

    block_size = SUPER_BLOCK

    @property
    def groups_per_block(self) -> int:
        return self.block_size // self.group_size

    def uncalibrated(self, w: Array) -> QuantizedTensor:
        # Covering the extremes wastes these types: without calibration all weights count the same.
        return self.searched_rounding(w, namespace(w).ones_like(w[:1, :]))

    def by_block(self, values: Array) -> Array:
        """Numbers of groups [M, 1] as [M / groups_per_block, groups_per_block]."""
        return namespace(values).reshape(values, (-1, self.groups_per_block))

    def _by_super_block(self, values: np.ndarray) -> np.ndarray:
        """Numbers of groups [N, G] as [N, B, groups_per_block]."""
        return values.reshape(len(values), -1, self.groups_per_block)

    def search(self, groups: Array, importance: Array) -> Scales:
        xp = namespace(groups)
        best = self.plain(groups)
        best_error = total(self.by_block(self.error(groups, importance, best)))
        trial = self.free(groups, importance)
        for _ in range(ALTERNATIONS):
            trial = self.refit(self.sums(groups, importance, trial), trial)
            error = total(self.by_block(self.error(groups, importance, trial)))
            better = xp.reshape(
                xp.broadcast_to(error < best_error, (error.shape[0], self.groups_per_block)), (-1, 1)
            )
            best = Scales(
                xp.where(better, trial.scale, best.scale), xp.where(better, trial.offset, best.offset)
            )
            best_error = xp.minimum(error, best_error)
        return best

    @abstractmethod
    def free(self, groups: Array, importance: Array) -> Scales:
        """Scales [M, 1] of groups [M, group_size] each on its own, not yet of the stored form."""


class SymmetricSuperBlock(SuperBlockGrid):
    """w = d * scale_j * level(q): signed scales, no minimum."""

    middle: int
    reach: int  # the level that the extreme value is given, on the negative side
    scale_limits: tuple[int, int]
    starts: tuple[float, ...]  # covering scales tried for a group on its own, relative to extreme / reach

    def _scales(self, scale: Array) -> Scales:
        return Scales(scale, namespace(scale).full_like(scale, float(self.middle)))

    def _extreme(self, values: Array) -> Array:
        """The value of largest magnitude on the last axis, with its sign."""
        xp = namespace(values)
        high, low = xp.max(values, axis=-1, keepdims=True), xp.min(values, axis=-1, keepdims=True)
        return xp.where(high > -low, high, low)

    def _compose(self, d: Array, ints: Array) -> Scales:
        """The scales [M, 1] that d [M / S, 1] and integers [M / S, S] stand for."""
        return self._scales(namespace(d).reshape(d * ints, (-1, 1)))

    def _integers(self, wanted: Array, d: Array) -> Array:
        """The nearest integer scales; 0 would waste a group that has a level of zero."""
        xp = namespace(wanted)
        low, high = self.scale_limits
        return self._nonzero(xp.clip(xp.round(ratio(wanted, d)), float(low), float(high)))

    def _nonzero(self, ints: Array) -> Array:
        xp = namespace(ints)
        return xp.where(ints == 0, xp.ones_like(ints), ints)

    def plain(self, groups: Array) -> Scales:
        xp = namespace(groups)
        wanted = self.by_block(self._extreme(groups) * (-1.0 / self.reach))  # [M / S, S]
        high = float(self.scale_limits[1])
        d = fp16_scale(xp.max(xp.abs(wanted), axis=-1, keepdims=True) / high)
        ints = wanted / d
        ints = xp.clip(xp.sign(ints) * xp.ceil(xp.abs(ints)), -high, high)
        return self._compose(d, self._nonzero(ints))

    def free(self, groups: Array, importance: Array) -> Scales:
        xp = namespace(groups)
        base = self._extreme(groups) * (-1.0 / self.reach)
        base = xp.where(base == 0, xp.ones_like(base), base)
        trials = joined([self._scales(base * start) for start in self.starts])
        sums = self.sums(groups, importance, trials)
        fitted = ratio(sums.product, sums.square)
        gain = fitted * sums.product  # how far the error falls below that of zeros
        best = xp.take_along_axis(fitted, xp.argmax(gain, axis=1, keepdims=True), axis=1)
        return self._scales(xp.where(best == 0, xp.ones_like(best), best))

    def refit(self, sums: Sums, scales: Scales) -> Scales:
        xp = namespace(sums.square)
        norm = self.by_block(sums.square)  # [M / S, S]
        wanted = ratio(self.by_block(sums.product), norm)
        extreme = self._extreme(wanted)
        best_d = best_ints = best_cost = None
        for bound in self.scale_limits:
            for neighbour in NEIGHBOURS:
                d = extreme / (bound * neighbour)
                ints = self._integers(wanted, d)
                d = fp16_scale(ratio(total(norm * ints * wanted), total(norm * ints * ints)))
                ints = self._integers(wanted, d)
                cost = total(norm * (d * ints - wanted) ** 2)
                if best_cost is None:
                    best_d, best_ints, best_cost = d, ints, cost
                    continue
                better = cost < best_cost
                best_d, best_ints = xp.where(better, d, best_d), xp.where(better, ints, best_ints)
                best_cost = xp.where(better, cost, best_cost)
        return self._compose(best_d, best_ints)

    def _tensor(self, codes: np.ndarray, d: np.ndarray, ints: np.ndarray) -> QuantizedTensor:
        """Codes [N, B, 256], bytes of d and integer scales [N, B, S] as they are read from a file."""
        n = len(codes)
        scale = from_half(d)[..., None] * ints.astype(np.float32)
        return QuantizedTensor(self, codes.reshape(n, -1), self._scales(scale.reshape(n, -1)))
