import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from lit_prune.errors import InputError
from lit_prune.measurement.summaries import (
    METRICS,
    axis_matrix,
    collapse,
    coupling,
    leave_one_out_means,
    rank_correlation,
    rank_persistence,
    unit_bootstrap,
    velocity,
)


def channel_table(widths=(12,), seed=0) -> pd.DataFrame:
    """A channel table of random metrics with a common part."""
    generator = np.random.default_rng(seed)
    frames = []
    for depth, width in enumerate(widths):
        common = generator.normal(size=(width, 1))
        values = (depth + 1) * np.exp(common + generator.normal(size=(width, len(METRICS))))
        frame = pd.DataFrame(values, columns=METRICS)
        frame.insert(0, "layer", f"layer{depth}")
        frame.insert(1, "channel", np.arange(width))
        frames.append(frame.assign(dead=False))
    return pd.concat(frames, ignore_index=True)


def test_rank_correlation_is_spearman_with_ties_and_ignores_nan():
    generator = np.random.default_rng(0)
    first, second = generator.integers(5, size=30).astype(float), generator.integers(5, size=30).astype(float)
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    first[3], second[7] = np.nan, np.nan
    both = np.isfinite(first) & np.isfinite(second)
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first[both], second[both]).statistic)


@pytest.mark.parametrize("first", [[1.0, 2.0], [1.0, 1.0, 1.0], [1.0, 2.0, np.nan]])
def test_rank_correlation_of_too_little_is_nan(first):
    assert math.isnan(rank_correlation(np.array(first), np.arange(len(first))))


def test_coupling_and_collapse_leave_dead_channels_out():
    layer = channel_table()
    live = layer.iloc[:9]
    layer.loc[9:, "dead"] = True
    layer.loc[9:, "input_capture"] = 0.0
    expected = spearmanr(live["input_capture"], live["task_information"]).statistic
    assert coupling(layer) == pytest.approx(expected)
    expected = spearmanr(live["task_information"], live["target_redundancy"]).statistic
    assert collapse(layer) == pytest.approx(expected)


def test_coupling_sees_ranks_alone():
    layer = channel_table()
    assert coupling(layer.assign(input_capture=np.exp(layer["input_capture"]))) == pytest.approx(coupling(layer))


def test_axis_matrix_of_one_layer_is_the_spearman_matrix():
    table = channel_table()
    expected = spearmanr(table[list(METRICS)]).statistic
    np.testing.assert_allclose(axis_matrix(table), expected, atol=1e-12)


def test_axis_matrix_pools_ranks_within_layers_whatever_their_scale_and_width():
    layer = channel_table((10,))
    copy = layer.assign(layer="other", **{name: 100 * layer[name] for name in METRICS})
    np.testing.assert_allclose(axis_matrix(pd.concat([layer, copy])), axis_matrix(layer), atol=1e-12)
    table = channel_table((10, 25))
    scaled = table.copy()
    scaled.loc[scaled["layer"] == "layer1", list(METRICS)] *= 1000.0
    np.testing.assert_allclose(axis_matrix(scaled), axis_matrix(table), atol=1e-12)


def test_velocity_is_the_rank_correlation_of_the_changes_in_any_row_order():
    before, after = channel_table(seed=1), channel_table(seed=2)
    capture = after["input_capture"] - before["input_capture"]
    information = after["task_information"] - before["task_information"]
    expected = spearmanr(capture, information).statistic
    assert velocity(before, after) == pytest.approx(expected)
    assert velocity(before, after.sample(frac=1, random_state=0)) == pytest.approx(expected)


def test_velocity_leaves_out_channels_dead_at_either_checkpoint():
    before, after = channel_table(seed=1), channel_table(seed=2)
    before.loc[0, "dead"] = True
    after.loc[1, "dead"] = True
    assert velocity(before, after) == pytest.approx(velocity(before.iloc[2:], after.iloc[2:]))


def test_rank_persistence_is_one_at_the_end_and_minus_one_when_reversed():
    final = channel_table()
    assert rank_persistence(final, final, "input_capture") == pytest.approx(1)
    assert rank_persistence(final.assign(peer_overlap=-final["peer_overlap"]), final, "peer_overlap") == pytest.approx(
        -1
    )


def test_tables_of_different_channels_are_refused():
    with pytest.raises(InputError, match="channels"):
        velocity(channel_table((5,)), channel_table((6,)))
    with pytest.raises(InputError, match="channels"):
        velocity(channel_table((5, 5)), channel_table((5, 5)))


def test_bootstrap_resamples_units_not_layers():
    values = [0.0] * 50 + [1.0] * 2
    units = ["net/0"] * 50 + ["net/1"] * 2
    found = unit_bootstrap(values, units)
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)


def test_bootstrap_interval_is_that_of_the_normal_mean():
    values = np.random.default_rng(0).normal(size=400)
    found = unit_bootstrap(values, np.arange(400))
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)
    assert found == unit_bootstrap(values, np.arange(400))


def test_bootstrap_leaves_nan_out_and_is_nan_without_values():
    assert unit_bootstrap([1.0, np.nan, 3.0], ["a", "a", "b"]).mean == 2
    assert math.isnan(unit_bootstrap([np.nan], ["a"]).low)


def test_leave_one_out_means_are_over_the_units_of_the_others():
    values = [1.0, 3.0, 5.0, 9.0, 9.0]
    units = ["r/0", "r/0", "r/1", "v/0", "m/0"]
    means = leave_one_out_means(values, units, ["r", "r", "r", "v", "m"])
    assert means == pytest.approx({"r": 9, "v": (2 + 5 + 9) / 3, "m": (2 + 5 + 9) / 3})
