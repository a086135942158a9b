"""Matched pairs and component R² against made-up damage."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from sklearn.linear_model import LinearRegression

from lit_prune.errors import InputError
from lit_prune.lab.analyze.damage import component_r2, matched_pairs, wilson
from lit_prune.lab.analyze.run import compare_runs


@pytest.fixture
def table():
    random = np.random.default_rng(0)
    names = ["weight_norm", "input_capture", "peer_overlap", "task_information"]
    frame = pd.DataFrame(random.normal(size=(80, 4)), columns=names)
    frame["layer"], frame["dead"] = np.repeat(["a", "b"], 40), False
    frame["damage"] = 2 * frame["input_capture"] - frame["peer_overlap"] + np.where(frame["layer"] == "a", 50.0, 0.0)
    return frame


def test_wilson_interval_is_that_of_scipy():
    found = wilson(37, 60)
    expected = binomtest(37, 60).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert np.isnan(wilson(0, 0).rate)


def test_damage_that_falls_with_overlap_wins_every_matched_pair(table):
    table["damage"] = -table["peer_overlap"]
    assert matched_pairs(table).rate == 1 and matched_pairs(table).pairs == 40
    table["damage"] = table["peer_overlap"]
    assert matched_pairs(table).rate == 0
    table["damage"] = 1.0
    assert matched_pairs(table).rate == 0.5


def test_pairs_are_neighbours_on_the_matched_metric():
    frame = pd.DataFrame({"layer": "a", "input_capture": [1.0, 9.0, 1.1, 9.1], "dead": False})
    frame["peer_overlap"], frame["damage"] = [0.0, 0.5, 1.0, 0.4], [2.0, 1.0, 1.0, 5.0]
    assert matched_pairs(frame).rate == 1  # 0 with 2, 1 with 3


def test_r2_is_that_of_a_regression_within_layers_and_ignores_their_level(table):
    assert component_r2(table[table["layer"] == "a"], ("input_capture", "peer_overlap")) == pytest.approx(1)
    features, damage = [], []
    for _, rows in table.groupby("layer"):
        features.append((rows["weight_norm"] - rows["weight_norm"].mean()) / rows["weight_norm"].std(ddof=0))
        damage.append((rows["damage"] - rows["damage"].mean()) / rows["damage"].std(ddof=0))
    features, damage = np.concatenate(features)[:, None], np.concatenate(damage)
    expected = LinearRegression(fit_intercept=False).fit(features, damage).score(features, damage)
    assert component_r2(table, ("weight_norm",)) == pytest.approx(expected)


def test_comparison_weighs_runs_and_not_layers(tmp_path):
    runs = {"one": ("a", [0.0] * 9), "two": ("a", [0.2]), "three": ("b", [0.4, 0.4])}
    for name, (backbone, values) in runs.items():
        (tmp_path / name).mkdir()
        pd.DataFrame({"layer": range(len(values)), "coupling": values}).to_parquet(tmp_path / name / "layers.parquet")
        record = f'{{"analyze": {{"backbone": {{"name": "{backbone}"}}}}}}'
        (tmp_path / name / "run.json").write_text(record)
    row = compare_runs([tmp_path / name for name in runs]).iloc[0]
    assert row["mean"] == pytest.approx(0.2) and row["layer_mean"] == pytest.approx(1 / 12)
    assert row["without_a"] == pytest.approx(0.4) and row["without_b"] == pytest.approx(0.1)
    assert row["low"] <= row["mean"] <= row["high"]
    with pytest.raises(InputError, match="has no layers.parquet"):
        compare_runs([tmp_path / "one", tmp_path])
