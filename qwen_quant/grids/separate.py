"""The search for scales where groups share nothing."""

from __future__ import annotations

from abc import abstractmethod

from qwen_quant.grids.base import AffineGrid, Array, Scales, joined, namespace

# Scales tried by the search, relative to the one that just covers the group's extreme value. Clipping the
# extreme often pays at few bits; a little above 1 pays when the other values then fall nearer to codes.
SHRINK = tuple(0.70 + 0.05 * step for step in range(8))
REFINEMENTS = 2


class SeparateGroups(AffineGrid):
    """A grid whose groups share nothing, so that each is searched for itself."""

    @abstractmethod
    def candidates(self, groups: Array) -> list[Scales]:
        """Scales the search tries for groups [M, group_size], each [M, 1]."""

    def search(self, groups: Array, importance: Array) -> Scales:
        xp = namespace(groups)
        trials = joined([self.plain(groups), *self.candidates(groups)])
        errors = self.error(groups, importance, trials)
        first = xp.argmin(errors, axis=1, keepdims=True)
        scale, offset, best_error = (
            xp.take_along_axis(x, first, axis=1) for x in (trials.scale, trials.offset, errors)
        )
        best = Scales(scale, offset)
        for _ in range(REFINEMENTS):
            trial = self.refit(self.sums(groups, importance, best), best)
            error = self.error(groups, importance, trial)
            better = error < best_error
            best = Scales(
                xp.where(better, trial.scale, best.scale), xp.where(better, trial.offset, best.offset)
            )
            best_error = xp.where(better, error, best_error)
        return best
