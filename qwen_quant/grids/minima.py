"""Super-blocks whose groups have a scale and a minimum: w = d * scale_j * q - dmin * minimum_j.

For given codes the weighted squared error of a group is, but for a constant,

    spread * (scale - slope)^2 + weight * (scale * mean code + offset - mean weight)^2

so that sums of each group are enough to choose d, dmin and all integers together.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_quant.grids.base import Array, Scales, Sums, fp16_scale, joined, namespace, ratio
from qwen_quant.grids.super_blocks import NEIGHBOURS, SuperBlockGrid, total


@dataclass
class _Moments:
    """Weighted moments of codes and weights in each group for given codes, all [M / S, S]."""

    weight: Array  # sum of the importances
    code: Array  # mean code
    value: Array  # mean weight
    spread: Array  # sum of importance * (code - mean code)^2
    slope: Array  # the scale of a regression of the weights on the codes
    start: Array  # the same, but of a line through zero where the regression has a positive offset

    def cost(self, scale: Array, offset: Array) -> Array:
        """How far the super-block's error [M / S, 1] lies above that of a free regression in each group."""
        return total(
            self.spread * (scale - self.slope) ** 2
            + self.weight * (scale * self.code + offset - self.value) ** 2
        )


class MinimumSuperBlock(SuperBlockGrid):
    """w = d * scale_j * q - dmin * minimum_j: integers from 0 to `limit` for both."""

    rule = "minimum"
    limit: int
    cuts: tuple[tuple[float, float], ...]  # shares of a group's range cut off below and above, as starts

    def value(self, codes: Array, scale: Array, offset: Array) -> Array:
        return scale * codes + offset

    def level(self, codes: Array, offset: Array) -> Array:
        return codes

    def position(self, w: Array, scale: Array, offset: Array) -> Array:
        return (w - offset) / scale

    def _compose(self, d: Array, dmin: Array, ints: Array, minima: Array) -> Scales:
        xp = namespace(d)
        return Scales(xp.reshape(d * ints, (-1, 1)), xp.reshape(-(dmin * minima), (-1, 1)))

    def _range(self, groups: Array) -> tuple[Array, Array]:
        """The least (or 0) and the greatest value of each group [M, 1]."""
        xp = namespace(groups)
        low = xp.clip(xp.min(groups, axis=1, keepdims=True), None, 0.0)
        return low, xp.maximum(xp.max(groups, axis=1, keepdims=True), low)

    def plain(self, groups: Array) -> Scales:
        xp = namespace(groups)
        low, high = (self.by_block(x) for x in self._range(groups))  # [M / S, S]
        limit = float(self.limit)
        dmin = fp16_scale(-xp.min(low, axis=-1, keepdims=True) / limit)
        minima = xp.clip(xp.ceil(-low / dmin), 0.0, limit)
        wanted = (high + dmin * minima) / self.max_code
        d = fp16_scale(xp.max(wanted, axis=-1, keepdims=True) / limit)
        return self._compose(d, dmin, xp.clip(xp.ceil(wanted / d), 1.0, limit), minima)

    def free(self, groups: Array, importance: Array) -> Scales:
        xp = namespace(groups)
        low, high = self._range(groups)
        span = high - low
        span = xp.where(span > 0, span, xp.ones_like(span))
        sums = self.sums(
            groups,
            importance,
            joined([Scales(span * ((1.0 - b - a) / self.max_code), low + span * b) for b, a in self.cuts]),
        )
        code, value = ratio(sums.level, sums.weight), ratio(sums.value, sums.weight)
        spread = sums.square - sums.weight * code * code
        covariance = sums.product - sums.weight * code * value
        scale = self._slope(covariance, spread, sums.square)
        offset = value - scale * code
        # A minimum is never positive: there the line goes through zero.
        positive = offset > 0
        gain = xp.where(
            positive,
            ratio(sums.product * sums.product, sums.square),
            sums.weight * value * value + scale * covariance,
        )
        scale = xp.where(positive, ratio(sums.product, sums.square), scale)
        best = xp.argmax(gain, axis=1, keepdims=True)
        scale, offset = (xp.take_along_axis(x, best, axis=1) for x in (scale, xp.clip(offset, None, 0.0)))
        return Scales(xp.where(scale > 0, scale, xp.ones_like(scale)), offset)

    def _moments(self, sums: Sums) -> _Moments:
        code, value = ratio(sums.level, sums.weight), ratio(sums.value, sums.weight)
        spread = sums.square - sums.weight * code * code
        covariance = sums.product - sums.weight * code * value
        slope = self._slope(covariance, spread, sums.square)
        through_zero = ratio(sums.product, sums.square)
        start = namespace(code).where(slope * code < value, through_zero, slope)
        return _Moments(*(self.by_block(x) for x in (sums.weight, code, value, spread, slope, start)))

    def _slope(self, covariance: Array, spread: Array, norm: Array) -> Array:
        """Of a regression; 0 where all codes are the same but for rounding errors."""
        return namespace(spread).where(spread > 1e-6 * norm, ratio(covariance, spread), covariance * 0.0)

    def refit(self, sums: Sums, scales: Scales) -> Scales:
        xp = namespace(sums.weight)
        moments = self._moments(sums)
        lowest = xp.clip(moments.start * moments.code - moments.value, 0.0, None)
        top = xp.max(moments.start, axis=-1, keepdims=True) / self.limit
        bottom = xp.max(lowest, axis=-1, keepdims=True) / self.limit
        best: tuple[Array, Array, Array, Array] | None = None
        best_cost = None
        for neighbour in NEIGHBOURS:
            d, dmin = fp16_scale(top * neighbour), fp16_scale(bottom * neighbour)
            ints, minima = self._integers(moments, d, dmin)
            d, dmin = self._super_scales(moments, ints, minima, d, dmin)
            ints, minima = self._integers(moments, d, dmin)
            cost = moments.cost(d * ints, -(dmin * minima))
            if best is None:
                best, best_cost = (d, dmin, ints, minima), cost
                continue
            better = cost < best_cost
            best_cost = xp.where(better, cost, best_cost)
            d, dmin, ints, minima = (
                xp.where(better, new, old) for new, old in zip((d, dmin, ints, minima), best, strict=True)
            )
            best = (d, dmin, ints, minima)
        assert best is not None
        return self._compose(*best)

    def _integers(self, moments: _Moments, d: Array, dmin: Array) -> tuple[Array, Array]:
        """The best integers for given super-scales: each scale next to the free one, with its best minimum."""
        xp = namespace(d)
        limit = float(self.limit)
        base = xp.floor(ratio(moments.start, d))
        best = best_minima = best_cost = None
        for step in (0.0, 1.0):
            ints = xp.clip(base + step, 1.0, limit)
            minima = xp.clip(xp.round((d * ints * moments.code - moments.value) / dmin), 0.0, limit)
            gap = d * ints * moments.code - dmin * minima - moments.value
            cost = moments.spread * (d * ints - moments.slope) ** 2 + moments.weight * gap * gap
            if best is None:
                best, best_minima, best_cost = ints, minima, cost
                continue
            better = cost < best_cost
            best, best_minima = xp.where(better, ints, best), xp.where(better, minima, best_minima)
        return best, best_minima

    def _super_scales(
        self, moments: _Moments, ints: Array, minima: Array, d: Array, dmin: Array
    ) -> tuple[Array, Array]:
        """The least-squares d and dmin [M / S, 1] for given integers, as FP16.

        Where no pair is best, as with minima that are all 0, they stay what they were.
        """
        xp = namespace(ints)
        pull = moments.weight * ints * moments.code
        a = total(moments.spread * ints * ints + pull * ints * moments.code)
        b = total(pull * minima)
        c = total(moments.weight * minima * minima)
        right = total(moments.spread * ints * moments.slope + pull * moments.value)
        left = total(moments.weight * minima * moments.value)
        determinant = a * c - b * b
        sound = determinant > 1e-6 * a * c
        safe = xp.where(sound, determinant, xp.ones_like(determinant))
        return (
            xp.where(sound, fp16_scale((right * c - left * b) / safe), d),
            xp.where(sound, fp16_scale((right * b - left * a) / safe), dmin),
        )
