"""Widths under a budget from tables of the damage that each group does at each width: arithmetic alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_prune.structure.widths import Price

ROUNDS = 8
_BISECTIONS = 80


@dataclass(frozen=True)
class Ladder:
    """Widths that one group may have, and the damage that each does when the group alone is cut to it.

    Attributes:
        widths: ascending, int64 [L]; the last is the dense one.
        errors: float64 [L], never rising; the last is 0.
    """

    widths: np.ndarray
    errors: np.ndarray

    @classmethod
    def interpolated(cls, widths: Sequence[int], errors: Sequence[float], allowed: np.ndarray) -> "Ladder":
        """A ladder over the widths `allowed` from errors measured at some widths.

        Between two measured widths the logarithm of the error is linear in the width, except next to the dense one,
        where the error falls linearly to 0. Errors are made monotone: a wider group is never counted as worse.

        Args:
            widths: measured, any order, the dense one among them.
            errors: at these widths.
            allowed: ascending, int64 [L], the dense one last.
        """
        order = np.argsort(widths)
        known, found = np.asarray(widths)[order], np.asarray(errors, dtype=np.float64)[order]
        found = np.maximum.accumulate(np.maximum(found, 0)[::-1])[::-1]
        if len(known) < 2:
            return cls(allowed, np.zeros(len(allowed)))
        least = found[found > 0].min() if (found > 0).any() else 1.0
        logs = np.interp(allowed, known[:-1], np.log(np.maximum(found[:-1], 1e-9 * least)))
        values = np.where(allowed > known[-2], np.interp(allowed, known[-2:], found[-2:]), np.exp(logs))
        values[-1] = 0.0
        return cls(allowed, np.maximum.accumulate(values[::-1])[::-1])


def cheapest_damage(ladders: Sequence[Ladder], price: Price, target: float) -> np.ndarray:
    """Widths of least summed damage whose exact price is at most `target`, int64 [G].

    Lagrangian sweep: for a multiplier each group takes the width that minimises damage + multiplier · price, which
    visits the lower convex hull of every ladder; the multiplier is the least that meets the target. The price of the
    whole is not separable (a layer costs the product of its two widths), so each group's widths are priced with the
    others held at the present point, and the sweep is repeated from where it ended, until it stays there. What is left
    of the budget then goes to the group whose next width takes away most damage per price.

    Args:
        ladders: one a group.
        price: of all widths together; must not fall when a width rises.
        target: largest price allowed.

    Returns:
        The smallest widths there are if even they cost more than `target`.
    """
    places = np.array([len(ladder.widths) - 1 for ladder in ladders])
    best, least = places, np.inf
    for _ in range(ROUNDS):
        moved = _sweep(ladders, _marginal_prices(ladders, places, price), price, target)
        filled = _fill(ladders, moved, price, target)
        damage = sum(ladder.errors[place] for ladder, place in zip(ladders, filled, strict=True))
        if damage < least:
            best, least = filled, damage
        if (moved == places).all():
            break
        places = moved
    return _widths(ladders, best)


def _widths(ladders: Sequence[Ladder], places: np.ndarray) -> np.ndarray:
    return np.array([ladder.widths[place] for ladder, place in zip(ladders, places, strict=True)], dtype=np.int64)


def _marginal_prices(ladders: Sequence[Ladder], places: np.ndarray, price: Price) -> list[np.ndarray]:
    """Price of the whole for every width of one group, the others at `places`; from its smallest width on."""
    point, found = _widths(ladders, places), []
    for index, ladder in enumerate(ladders):
        values = []
        for width in ladder.widths:
            trial = point.copy()
            trial[index] = width
            values.append(price(trial))
        found.append(np.array(values, dtype=np.float64) - values[0])
    return found


def _sweep(ladders: Sequence[Ladder], prices: list[np.ndarray], price: Price, target: float) -> np.ndarray:
    def places(log_multiplier: float) -> np.ndarray:
        multiplier = np.exp(log_multiplier)
        return np.array([_lowest(a.errors + multiplier * b) for a, b in zip(ladders, prices, strict=True)])

    low, high = _range(ladders, prices)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if price(_widths(ladders, places(middle))) <= target:
            high = middle
        else:
            low = middle
    return places(high)


def _range(ladders: Sequence[Ladder], prices: list[np.ndarray]) -> tuple[float, float]:
    """Logarithms of multipliers under which nothing and everything goes."""
    slopes = []
    for ladder, prices_here in zip(ladders, prices, strict=True):
        rise, fall = np.diff(prices_here), -np.diff(ladder.errors)
        slopes += list(fall[(rise > 0) & (fall > 0)] / rise[(rise > 0) & (fall > 0)])
    slopes = slopes or [1.0]
    return np.log(min(slopes)) - 10, np.log(max(slopes)) + 10


def _lowest(values: np.ndarray) -> int:
    """Place of the least value, the widest of equal ones."""
    return len(values) - 1 - int(np.argmin(values[::-1]))


def _fill(ladders: Sequence[Ladder], places: np.ndarray, price: Price, target: float) -> np.ndarray:
    """Takes widths back while they fit, those that mend most per price first; exact prices."""
    places, spent = places.copy(), price(_widths(ladders, places))
    while spent <= target:
        worth = {}
        for index, ladder in enumerate(ladders):
            for place in range(places[index] + 1, len(ladder.widths)):
                trial = places.copy()
                trial[index] = place
                cost = price(_widths(ladders, trial))
                if cost > target:
                    break
                saved = ladder.errors[places[index]] - ladder.errors[place]
                worth[index, place, cost] = saved / max(cost - spent, 1e-12)
        if not worth:
            break
        index, place, spent = max(worth, key=worth.__getitem__)
        places[index] = place
    return places
