import itertools

import numpy as np
import pytest

from lit_prune.structure.ladders import Ladder, cheapest_damage


def ladder(rng, size: int, convex: bool) -> Ladder:
    """A ladder of all widths 1..size with random damage."""
    falls = rng.exponential(1.0, size - 1)
    if convex:
        falls = np.sort(falls)[::-1]
    errors = np.concatenate([np.cumsum(falls[::-1])[::-1], [0.0]])
    return Ladder(np.arange(1, size + 1), errors)


def brute_force(ladders, price, target):
    """Least damage over all combinations of widths."""
    best, damage = None, np.inf
    for places in itertools.product(*(range(len(item.widths)) for item in ladders)):
        widths = np.array([item.widths[place] for item, place in zip(ladders, places, strict=True)])
        total = sum(item.errors[place] for item, place in zip(ladders, places, strict=True))
        if price(widths) <= target and total < damage:
            best, damage = widths, total
    return best, damage


def exact(ladders, prices, target):
    """Dynamic programme over whole-number separable prices: least damage within every budget up to `target`."""
    least = np.zeros(target + 1)
    for item, unit in zip(ladders, prices, strict=True):
        table = np.full(target + 1, np.inf)
        for width, error in zip(item.widths, item.errors, strict=True):
            cost = int(width * unit)
            table[cost:] = np.minimum(table[cost:], least[: target + 1 - cost] + error) if cost <= target else np.inf
        least = table
    return least[target]


def damage_of(ladders, widths):
    return sum(float(item.errors[item.widths == width][0]) for item, width in zip(ladders, widths, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_convex_ladders_with_equal_prices_are_solved_exactly(seed):
    rng = np.random.default_rng(seed)
    ladders = [ladder(rng, size, True) for size in (4, 5, 6)]
    widths = cheapest_damage(ladders, lambda w: int(w.sum()), 9)
    assert widths.sum() <= 9
    assert damage_of(ladders, widths) == pytest.approx(brute_force(ladders, lambda w: int(w.sum()), 9)[1])


@pytest.mark.parametrize("seed", range(12))
def test_dynamic_programme_agrees_with_brute_force_and_the_sweep_stays_within_one_segment_of_a_hull(seed):
    rng = np.random.default_rng(100 + seed)
    ladders = [ladder(rng, size, seed % 2 == 0) for size in (5, 6, 7)]
    prices = rng.integers(1, 6, 3)
    target = int(0.6 * sum(item.widths[-1] * unit for item, unit in zip(ladders, prices, strict=True)))
    price = lambda w: int((w * prices).sum())  # noqa: E731
    least = exact(ladders, prices, target)
    assert least == pytest.approx(brute_force(ladders, price, target)[1])
    widths = cheapest_damage(ladders, price, target)
    assert price(widths) <= target
    falls = [-np.diff(item.errors) for item in ladders]
    segment = max(fall.max() if seed % 2 == 0 else fall.sum() for fall in falls)  # of a hull: a step, at most the whole
    assert least - 1e-12 <= damage_of(ladders, widths) <= least + segment + 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_prices_that_are_products_are_met_exactly_and_nearly_as_well_as_by_brute_force(seed):
    rng = np.random.default_rng(200 + seed)
    ladders = [ladder(rng, size, True) for size in (6, 6, 6)]
    price = lambda w: int(3 * w[0] + w[0] * w[1] + w[1] * w[2] + 2 * w[2])  # noqa: E731
    target = int(0.5 * price(np.array([6, 6, 6])))
    widths, (_, least) = cheapest_damage(ladders, price, target), brute_force(ladders, price, target)
    assert price(widths) <= target
    everything = damage_of(ladders, [1, 1, 1])
    assert damage_of(ladders, widths) <= least + 0.15 * everything


def test_a_group_that_does_no_damage_goes_first_and_a_costly_one_stays():
    free = Ladder(np.arange(1, 9), np.zeros(8))
    dear = Ladder(np.arange(1, 9), np.linspace(70, 0, 8))
    widths = cheapest_damage([free, dear], lambda w: int(w.sum()), 10)
    assert widths.tolist() == [2, 8]


def test_an_unreachable_budget_gives_the_smallest_widths():
    item = Ladder(np.array([2, 4]), np.array([1.0, 0.0]))
    assert cheapest_damage([item, item], lambda w: int(w.sum()), 3).tolist() == [2, 2]


def test_interpolation_is_exact_where_measured_monotone_and_zero_at_the_dense_width():
    found = Ladder.interpolated([8, 2, 4], [0.0, 9.0, 1.0], np.arange(1, 9))
    assert found.errors[[1, 3, 7]].tolist() == pytest.approx([9.0, 1.0, 0.0])
    assert (np.diff(found.errors) <= 0).all()
    assert found.errors[2] == pytest.approx(3.0)  # the geometric mean of its neighbours
