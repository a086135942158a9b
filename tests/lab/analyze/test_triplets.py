import itertools
import math

import numpy as np
import pytest
import torch

from lit_prune.errors import InputError
from lit_prune.lab.analyze.triplets import triplet_excess


def statistics(channels: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(seed)
    samples = generator.normal(size=(400, channels + 1))
    samples[:, 0] += samples[:, 1:] @ generator.normal(size=channels)
    samples[:, 1:] += 0.5 * generator.normal(size=(400, 1))
    matrix = torch.from_numpy(np.corrcoef(samples.T))
    return matrix[0, 1:], matrix[1:, 1:]


def information(task: torch.Tensor, between: torch.Tensor, chosen: tuple[int, ...]) -> float:
    places = list(chosen)
    rho = task[places]
    return -0.5 * math.log(1 - float(rho @ torch.linalg.solve(between[places][:, places], rho)))


def test_excess_is_that_of_the_gaussian_regressions():
    task, between = statistics(7)
    found = triplet_excess(task, between)
    assert sorted(sorted(row) for row in found.triples.tolist()) == [
        list(c) for c in itertools.combinations(range(7), 3)
    ]
    for row, triple, pair in zip(found.triples.tolist(), found.triple_excess, found.pair_excess, strict=True):
        best = max(information(task, between, two) for two in itertools.combinations(row, 2))
        single = max(information(task, between, (one,)) for one in row)
        assert float(triple) == pytest.approx(information(task, between, tuple(row)) - best, abs=1e-9)
        assert float(pair) == pytest.approx(best - single, abs=1e-9)


def test_ratio_of_independent_equal_parts_has_its_closed_form():
    share = 0.3
    task = torch.full((5,), share, dtype=torch.float64)
    found = triplet_excess(task, torch.eye(5, dtype=torch.float64))
    first, second, third = (-0.5 * math.log(1 - k * share**2) for k in (1, 2, 3))
    assert found.ratio == pytest.approx((third - second) / (second - first))


def test_a_duplicate_adds_nothing():
    task = torch.tensor([0.6, 0.6, 0.3], dtype=torch.float64)
    between = torch.tensor([[1, 1, 0.1], [1, 1, 0.1], [0.1, 0.1, 1]], dtype=torch.float64)
    assert float(triplet_excess(task, between).triple_excess[0]) == pytest.approx(0, abs=1e-5)


def test_triples_are_seeded_distinct_and_from_the_most_informative_live_channels():
    task, between = statistics(40)
    task[3] = torch.nan
    found = triplet_excess(task, between, pool=10, limit=50, seed=1)
    top = set(task.abs().nan_to_num(-1).topk(10).indices.tolist())
    assert found.triples.shape == (50, 3)
    assert set(found.triples.flatten().tolist()) <= top
    assert len({tuple(sorted(row)) for row in found.triples.tolist()}) == 50
    assert torch.equal(found.triples, triplet_excess(task, between, pool=10, limit=50, seed=1).triples)
    assert not torch.equal(found.triples, triplet_excess(task, between, pool=10, limit=50, seed=2).triples)


def test_default_draw_is_1500_of_the_triples_of_24_channels():
    found = triplet_excess(*statistics(30))
    assert found.triples.shape == (1500, 3)
    assert len(found.triples.unique()) == 24


def test_two_channels_have_no_triplet():
    assert math.isnan(triplet_excess(torch.tensor([0.1, 0.2]), torch.eye(2)).ratio)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="between"):
        triplet_excess(torch.ones(3), torch.eye(2))
