"""Statistics of lesions against closed forms and made-up tables."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, rankdata, spearmanr

from lit_prune.lab.lesion.statistics import (
    SCORES,
    add_scores,
    bootstrap_correlation,
    half_won,
    lesion_tables,
    match_on_task,
    matched_task_table,
    rank_damage,
    ranking_table,
    threshold_table,
)


@pytest.fixture
def lesions():
    random = np.random.default_rng(0)
    names = ["weight_norm", "input_capture", "peer_overlap", "task_information", "target_excess"]
    table = pd.DataFrame(random.normal(size=(120, 5)), columns=names)
    table["peer_r2"], table["compact_support"] = random.uniform(size=120), random.uniform(size=120)
    table["hull_size"] = random.integers(1, 11, 120)
    table["damage"] = np.exp(random.normal(-6, 2, 120))
    table["damage_error"] = random.uniform(1e-4, 1e-2, 120)
    table["recovery"] = table["peer_r2"] + 0.3 * random.normal(size=120) - 0.3
    table["layer"], table["depth"], table["dead"] = np.repeat(["a", "b", "c"], 40), np.repeat([0, 1, 2], 40), False
    return table


def test_threshold_table_counts_what_lies_above(lesions):
    table = threshold_table(lesions, [1e-4, 1e9])
    some = lesions[lesions["damage"] > 1e-4]
    row = table.iloc[0]
    assert row["channels"] == len(some) and row["median_recovery"] == some["recovery"].median()
    assert row["noise"] == some["damage_error"].median()
    assert row["helped"] == pytest.approx((some["recovery"] > 0).mean())
    interval = binomtest(int((some["recovery"] > 0).sum()), len(some)).proportion_ci(method="wilson")
    assert (row["helped_low"], row["helped_high"]) == pytest.approx((interval.low, interval.high))
    assert row["peer_r2"] == pytest.approx(spearmanr(some["peer_r2"], some["recovery"]).statistic)
    assert table.iloc[1]["channels"] == 0 and np.isnan(table.iloc[1]["median_recovery"])


def test_bootstrap_is_the_interval_of_resampled_spearman_correlations():
    random = np.random.default_rng(1)
    first = random.normal(size=50)
    second = np.round(first + random.normal(size=50), 1)  # with ties
    found = bootstrap_correlation(first, second, resamples=300, seed=4)
    draws = np.random.default_rng(4).integers(50, size=(300, 50))
    slow = [spearmanr(first[draw], second[draw]).statistic for draw in draws]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))
    assert found.mean == pytest.approx(spearmanr(first, second).statistic)
    exact = bootstrap_correlation(first, rankdata(first), resamples=50)
    assert (exact.mean, exact.low, exact.high) == pytest.approx((1, 1, 1))
    assert np.isnan(bootstrap_correlation(first[:2], second[:2]).low)


def test_matching_removes_what_task_information_explains(lesions):
    lesions["recovery"] = np.floor(lesions.groupby("layer")["task_information"].rank() / 8.001)
    lesions["peer_r2"] = 3 * lesions["recovery"] + 1e-3 * lesions["input_capture"]
    pooled = threshold_table(lesions, [0.0]).iloc[0]
    assert pooled["task_information"] > 0.8 and pooled["peer_r2"] > 0.9
    matched = match_on_task(lesions)
    assert (matched.groupby(["layer", "bin"]).size() == 8).all() and not matched["recovery"].any()
    row = matched_task_table(lesions, thresholds=[0.0]).iloc[0]
    assert np.isnan(row["peer_r2"]) and row["high_peer_win"] == 0.5 and row["bins"] == 15


def test_recovery_that_follows_the_peers_wins_every_bin(lesions):
    lesions["recovery"] = lesions["peer_r2"] ** 3
    row = matched_task_table(lesions, thresholds=[0.0]).iloc[0]
    assert row["high_peer_win"] == 1 and row["peer_r2"] > 0.9
    assert row["peer_r2_low"] <= row["peer_r2"] <= row["peer_r2_high"]
    interval = binomtest(15, 15).proportion_ci(method="wilson")
    assert (row["win_low"], row["win_high"]) == pytest.approx((interval.low, interval.high))
    assert half_won(pd.DataFrame({"peer_r2": [1, 2, 3], "recovery": [5.0, 9.0, 4.0]})) == 0


def test_small_cells_have_fewer_bins_and_the_smallest_none(lesions):
    few = lesions.groupby("layer").head(9)
    assert match_on_task(few).groupby("layer")["bin"].nunique().tolist() == [2, 2, 2]
    assert not len(match_on_task(lesions.groupby("layer").head(3)))


def test_a_score_that_orders_the_damage_agrees_in_every_layer_whatever_its_scale(lesions):
    lesions["damage"] = np.exp(lesions["input_capture"] + 5 * lesions["depth"])
    table = ranking_table(lesions, rank_damage(lesions)).set_index("score")
    best = table.loc["-capture"]
    assert (best["agreement"], best["pooled"], best["standard_error"]) == pytest.approx((1, 1, 0))
    assert table.loc["-capture+overlap", "agreement"] < 1 and table.loc["-capture", "layers"] == 3
    lesions["damage"] = -lesions["peer_overlap"]
    table = ranking_table(lesions, rank_damage(lesions)).set_index("score")
    assert table.loc["overlap", "matched_win"] == 1 and table.loc["overlap", "pairs"] == 60


def test_sums_of_scores_are_standardised_within_the_cell(lesions):
    moved = lesions.assign(input_capture=lesions["input_capture"] * 100 + lesions["depth"] * 7)
    for name in SCORES:
        np.testing.assert_allclose(add_scores(moved)[name], add_scores(lesions)[name], atol=1e-9)


def test_dead_channels_count_nowhere(lesions):
    dead = lesions.iloc[:10].assign(dead=True, damage=1e6, recovery=-1e6)
    with_dead = lesion_tables(pd.concat([lesions, dead], ignore_index=True))
    for name, table in lesion_tables(lesions).items():
        pd.testing.assert_frame_equal(with_dead[name], table)
