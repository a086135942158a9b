"""The search for group widths under a budget: pure arithmetic on sorted scores."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lit_prune.structure.axes import EVEN

Price = Callable[[np.ndarray], float]  # widths int64 [G] -> cost
WIDE = 4 * EVEN
"""Groups at least so wide have enough widths that are even."""


@dataclass(frozen=True)
class Steps:
    """Everything that can be removed, in steps of `step_of` units, over all groups.

    Attributes:
        sizes: dense widths, int64 [G].
        group: group of each step, int64 [S].
        units: units that the step removes, int64 [S].
        scores: mean score of these units, float64 [S]; never falls within a group.
        order: step numbers in the order of removal over all groups; keeps the order within each group.
        first: number of the first step of each group, int64 [G+1]; the steps of a group lie one after the other.
    """

    sizes: np.ndarray
    group: np.ndarray
    units: np.ndarray
    scores: np.ndarray
    order: np.ndarray
    first: np.ndarray

    @classmethod
    def build(cls, scores: list[np.ndarray], round_to: int | None, cap: float) -> "Steps":
        """Steps of groups with these scores; at most the share `cap` of a group goes, at least one unit stays."""
        parts = [_steps_of(np.sort(values), round_to, cap) for values in scores]
        counts = [len(units) for units, _ in parts]
        units = np.concatenate([units for units, _ in parts])
        means = np.concatenate([means for _, means in parts])
        group = np.repeat(np.arange(len(scores)), counts)
        first = np.concatenate([[0], np.cumsum(counts)])
        depth = np.arange(len(units)) - first[group]
        order = np.lexsort((group, depth, means))
        return cls(np.array([len(values) for values in scores]), group, units, means, order, first)

    def after(self, removed: np.ndarray) -> np.ndarray:
        """Widths when the first `removed[g]` steps of each group are taken, int64 [G]."""
        totals = np.concatenate([[0], np.cumsum(self.units)])
        return self.sizes - (totals[self.first[:-1] + removed] - totals[self.first[:-1]])

    def taken(self, count: int) -> np.ndarray:
        """Steps taken from each group by the first `count` of `order`, int64 [G]."""
        return np.bincount(self.group[self.order[:count]], minlength=len(self.sizes))

    def steps_to(self, widths: np.ndarray) -> np.ndarray:
        """Steps that bring each group to at most `widths`, or as near as there are steps, int64 [G]."""
        totals = np.concatenate([[0], np.cumsum(self.units)])
        goal = totals[self.first[:-1]] + np.maximum(self.sizes - np.floor(widths + 1e-9), 0)
        return np.minimum(np.searchsorted(totals, goal), self.first[1:]) - self.first[:-1]

    def nearest(self, widths: np.ndarray) -> np.ndarray:
        """The allowed widths nearest to `widths`, the wider one of two, int64 [G]."""
        steps = self.steps_to(widths)
        below, above = self.after(steps), self.after(np.maximum(steps - 1, 0))
        return np.where(np.abs(above - widths) <= np.abs(below - widths), above, below)

    def wider(self, group: int, widths: np.ndarray) -> np.ndarray | None:
        """`widths` with one step of `group` taken back; None if it has lost none."""
        steps = self.steps_to(widths)
        if not steps[group]:
            return None
        steps[group] -= 1
        return self.after(steps)


def global_widths(steps: Steps, price: Price, target: float) -> np.ndarray:
    """Widths under one threshold over all groups: fewest steps in order of score within the budget, then a fill.

    Args:
        steps: the steps.
        price: cost of widths; must not rise when a width falls.
        target: largest cost allowed.

    Returns:
        int64 [G]; the smallest widths there are if even they cost more than `target`.
    """
    fits = lambda count: price(steps.after(steps.taken(count))) <= target  # noqa: E731
    count = bisect_left(range(len(steps.order)), True, key=fits)
    return _fill(steps, steps.taken(count), price, target, lambda last: steps.scores[last])


def uniform_widths(steps: Steps, price: Price, target: float) -> np.ndarray:
    """Widths with the same share kept everywhere: the largest share within the budget, then a fill.

    The fill gives at most one step back to each group, those first that rounding took most from.

    Args:
        steps: the steps.
        price: cost of widths; must not rise when a width falls.
        target: largest cost allowed.
    """
    resolution = 1 << 20
    share = lambda removed: 1 - removed / resolution  # noqa: E731
    fits = lambda removed: price(steps.after(steps.steps_to(share(removed) * steps.sizes))) <= target  # noqa: E731
    removed = bisect_left(range(resolution), True, key=fits)
    ideal = share(removed) * steps.sizes
    taken = steps.steps_to(ideal)
    loss = (ideal - steps.after(taken)) / steps.sizes
    once = np.maximum(taken - 1, 0)
    return _fill(steps, taken, price, target, lambda last: loss[steps.group[last]], once)


def step_of(size: int, round_to: int | None) -> int:
    """Units by which a group of `size` is cut: `round_to`; for None `EVEN` where it is a multiple of it and `WIDE`."""
    if round_to is not None:
        return round_to
    return EVEN if size >= WIDE and size % EVEN == 0 else 1


def allowed_widths(size: int, round_to: int | None, cap: float) -> np.ndarray:
    """Widths that a group may have: multiples of `step_of` and the dense one, ascending, int64 [L].

    At most the share `cap` goes, at least one unit stays.
    """
    step = step_of(size, round_to)
    fewest = max(1, size - int(cap * size + 1e-9))
    lowest = -(-fewest // step) * step  # a multiple of the step, at least the step itself
    return np.append(np.arange(lowest, size, step, dtype=np.int64), size)


def _steps_of(ascending: np.ndarray, round_to: int | None, cap: float) -> tuple[np.ndarray, np.ndarray]:
    """Units and mean score of each step of one group, lowest scores first."""
    size = len(ascending)
    widths = allowed_widths(size, round_to, cap)[-2::-1]
    if not len(widths):
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    ends = size - widths
    starts = np.concatenate([[0], ends[:-1]])
    units = ends - starts
    means = np.add.reduceat(ascending[: ends[-1]], starts) / units
    return units, np.maximum.accumulate(means)  # rounding must not turn the order of equal scores


def _fill(
    steps: Steps,
    taken: np.ndarray,
    price: Price,
    target: float,
    worth: Callable[[np.ndarray], np.ndarray],
    least: np.ndarray | int = 0,
) -> np.ndarray:
    """Takes steps back while they fit, those of greatest worth first; a group whose step does not fit is done."""
    taken = taken.copy()
    if price(steps.after(taken)) > target:
        return steps.after(taken)
    open_groups = taken > least
    while open_groups.any():
        groups = np.flatnonzero(open_groups)
        last = steps.first[groups] + taken[groups] - 1
        chosen = groups[np.argmax(worth(last))]
        taken[chosen] -= 1
        if price(steps.after(taken)) > target:
            taken[chosen] += 1
            open_groups[chosen] = False
        else:
            open_groups[chosen] = taken[chosen] > np.broadcast_to(least, taken.shape)[chosen]
    return steps.after(taken)
