import math

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score

from lit_prune.errors import InputError
from lit_prune.scores.groupings import (
    LOCAL_FEATURES,
    TARGET_FEATURES,
    adjusted_rand_index,
    group_channels,
    grouping_agreement,
    permutation_null,
)


def layer_of(local: np.ndarray, target: np.ndarray) -> pd.DataFrame:
    columns = [*LOCAL_FEATURES, *TARGET_FEATURES]
    return pd.DataFrame(np.concatenate([local, target], 1), columns=columns).assign(layer="conv", dead=False)


def three_clouds(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    member = generator.permutation(np.arange(count) % 3)
    return member, np.array([[0, 0], [9, 0], [0, 9]])[member] + generator.normal(size=(count, 2))


@pytest.mark.parametrize("seed", range(5))
def test_rand_index_is_that_of_scikit_learn(seed):
    generator = np.random.default_rng(seed)
    first = generator.integers(4, size=50)
    others = generator.integers(3, size=(20, 50))
    others[0] = (first + 1) % 4
    expected = [adjusted_rand_score(first, other) for other in others]
    np.testing.assert_allclose(adjusted_rand_index(first, others), expected, atol=1e-12)


def test_rand_index_of_trivial_groupings_is_that_of_scikit_learn():
    for first, second in [([0, 0, 0], [5, 5, 5]), ([0, 1, 2], [2, 1, 0]), ([0, 0, 1], [0, 0, 0])]:
        expected = adjusted_rand_score(first, second)
        assert float(adjusted_rand_index(np.array(first), np.array(second))) == pytest.approx(expected)


def test_null_shuffles_keep_the_sizes_and_centre_on_zero():
    generator = np.random.default_rng(0)
    first, second = generator.integers(3, size=200), generator.integers(3, size=200)
    null = permutation_null(first, second, shuffles=400)
    assert null.shape == (400,)
    assert abs(null.mean()) < 4 * null.std() / 20
    assert len(np.unique(null)) > 50
    np.testing.assert_array_equal(null, permutation_null(first, second, shuffles=400))


def test_separated_clouds_are_found_whatever_the_scale_of_a_feature():
    member, points = three_clouds(90, 0)
    assert float(adjusted_rand_index(member, group_channels(points))) == 1
    assert float(adjusted_rand_index(member, group_channels(points * [1e6, 1e-6]))) == 1


def test_equal_groups_agree_and_are_far_above_the_null():
    _, points = three_clouds(90, 0)
    found = grouping_agreement(layer_of(points, 5 * points))
    assert found.rand_index == 1
    assert found.null_95 < 0.1
    assert found.local_silhouette == pytest.approx(found.target_silhouette)
    assert found.local_silhouette > 0.6


def test_independent_groups_stay_within_the_null():
    found = grouping_agreement(layer_of(three_clouds(300, 0)[1], three_clouds(300, 1)[1]))
    assert abs(found.rand_index) < 0.03
    assert abs(found.null_mean) < 0.01 < found.null_95 + 0.01


def test_dead_channels_are_left_out():
    local, target = three_clouds(60, 0)[1], three_clouds(60, 1)[1]
    layer = layer_of(local, target)
    broken = pd.concat([layer, layer.iloc[:5].assign(dead=True), layer.iloc[:5].assign(peer_overlap=np.nan)])
    assert grouping_agreement(broken) == grouping_agreement(layer)


@pytest.mark.parametrize("count", [3, 10])
def test_too_few_distinct_channels_have_no_grouping(count):
    flat = np.ones((count, 2))
    assert math.isnan(grouping_agreement(layer_of(flat, flat)).rand_index)
    with pytest.raises(InputError, match="distinct"):
        group_channels(flat)
