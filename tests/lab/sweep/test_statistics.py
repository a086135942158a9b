"""Areas, intervals and choices of a sweep against closed forms and enumerations."""

import itertools

import numpy as np
import pandas as pd
import pytest

from lit_prune.errors import InputError
from lit_prune.lab.sweep import statistics

AXES = {
    "magnitude": "baseline",
    "taylor": "baseline",
    "composite_ix": "local",
    "cap": "local",
    "composite_pid": "target",
}


def cells_of(method: str, points: list[tuple[float, float]], **fields) -> pd.DataFrame:
    """Cells of one curve: MACs removed and accuracy after recovery; 0.1 before it."""
    rows = pd.DataFrame(points, columns=["macs_removed", "accuracy_after"])
    base = {"checkpoint": "a", "seed": 0, "unit": "0", "method": method, "axis": AXES.get(method, "local")}
    base |= {"allocation": "global", "removal": "physical", "recovery": "sgd", "accuracy_before": 0.1, "error": None}
    base |= {"batches": 200, "sparsity": rows["macs_removed"], **fields}
    return rows.assign(**base)


def level(method: str, height: float, unit: str = "0", **fields) -> pd.DataFrame:
    """Cells of a flat curve over [0.1, 0.9] of one unit."""
    return cells_of(method, [(0.1, height), (0.9, height)], unit=unit, checkpoint=unit, **fields)


def recovered(*cells: pd.DataFrame) -> pd.DataFrame:
    curves = statistics.accuracy_curves(pd.concat(cells, ignore_index=True))
    return curves[curves["recovery"] == "sgd"]


def test_area_of_a_line_is_its_value_in_the_middle_whatever_the_points():
    places = np.array([0.9, 0.05, 0.33, 0.5, 0.41])
    area = statistics.area_under(places, 0.8 - 0.5 * places, 0.1, 0.6)
    assert area == pytest.approx(0.8 - 0.5 * 0.35, abs=1e-12)


def test_area_of_a_bent_curve_adds_its_trapezoids_and_averages_equal_places():
    flops, accuracy = [0.0, 0.5, 0.5, 1.0], [1.0, 0.4, 0.8, 0.0]  # 1 -> 0.6 -> 0
    expected = (0.25 * (0.8 + 0.6) / 2 + 0.25 * (0.6 + 0.3) / 2) / 0.5  # over [0.25, 0.75]
    assert statistics.area_under(flops, accuracy, 0.25, 0.75) == pytest.approx(expected, abs=1e-12)


def test_the_interval_is_covered_by_every_curve_and_shared_by_all_units():
    curves = recovered(
        cells_of("magnitude", [(0.1, 1), (0.8, 0)]),
        cells_of("cap", [(0.3, 1), (0.95, 0)]),
        cells_of("cap", [(0.2, 1), (0.7, 0)], unit="1", seed=1),
    )
    assert statistics.common_interval(curves) == (0.3, 0.7)
    assert set(statistics.areas(curves, ["magnitude", "cap"])[["low", "high"]].itertuples(index=False, name=None)) == {
        (0.3, 0.7)
    }
    assert statistics.common_interval(curves[curves["method"] == "magnitude"]) == (0.1, 0.8)


def test_methods_without_a_shared_interval_are_named():
    curves = recovered(cells_of("magnitude", [(0.1, 1), (0.3, 0)]), cells_of("cap", [(0.4, 1), (0.9, 0)]))
    with pytest.raises(InputError, match=r"'cap' .* begins at 0.400, 'magnitude' .* ends at 0.300"):
        statistics.areas(curves, ["magnitude", "cap"])


def test_paired_interval_is_the_one_of_all_resamples():
    local, target = [0.9, 0.7, 0.8, 0.75], [0.5, 0.6, 0.55, 0.52]
    parts = [level("cap", a, str(i)) for i, a in enumerate(local)]
    parts += [level("composite_pid", b, str(i)) for i, b in enumerate(target)]
    found = statistics.gaps(statistics.areas(recovered(*parts), ["cap", "composite_pid"])).iloc[0]
    difference = np.subtract(local, target)
    means = sorted(np.mean(draw) for draw in itertools.product(difference, repeat=4))  # 256 equally likely resamples
    ends = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    assert (found["comparison"], found["first"], found["second"]) == (
        "best local – best target",
        "cap",
        "composite_pid",
    )
    assert found["mean"] == pytest.approx(difference.mean()) and found["positive"] == found["units"] == 4
    assert (found["ci_low"], found["ci_high"]) == pytest.approx(tuple(ends), abs=0.011)  # the next values lie 0.01 off


def test_pairing_takes_out_what_units_have_in_common():
    shift = [0.0, 0.3, 0.6]
    parts = [level("cap", 0.3 + s, str(i)) for i, s in enumerate(shift)]
    parts += [level("magnitude", 0.25 + s, str(i)) for i, s in enumerate(shift)]
    found = statistics.gaps(statistics.areas(recovered(*parts), ["cap", "magnitude"])).iloc[0]
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((0.05, 0.05))


def test_one_unit_has_no_interval():
    parts = level("cap", 0.5), level("magnitude", 0.4)
    found = statistics.gaps(statistics.areas(recovered(*parts), ["cap", "magnitude"])).iloc[0]
    assert found["mean"] == pytest.approx(0.1) and np.isnan(found["ci_low"]) and np.isnan(found["ci_high"])


def test_runs_of_one_checkpoint_are_one_unit():
    parts = [level("cap", h, "m", seed=seed) for seed, h in enumerate((0.2, 0.4))] + [level("cap", 0.9, "n")]
    found = statistics.areas(recovered(*parts), ["cap"])
    assert found.set_index("unit")["auc"].to_dict() == pytest.approx({"m": 0.3, "n": 0.9})


def test_the_selector_never_looks_at_the_unit_it_is_judged_on():
    heights = {"cap": [0.9, 0.2, 0.2], "composite_ix": [0.1, 0.5, 0.5], "composite_pid": [0.3, 0.3, 0.3]}
    parts = [level(name, h, str(i)) for name, column in heights.items() for i, h in enumerate(column)]
    found = statistics.select_leave_one_out(statistics.areas(recovered(*parts), list(heights))).set_index("unit")
    assert found["chosen"].to_dict() == {"0": "composite_ix", "1": "cap", "2": "cap"}
    assert found["minus_best_local"].to_dict() == pytest.approx({"0": -0.8, "1": -0.3, "2": -0.3})
    assert found["minus_best_target"].to_dict() == pytest.approx({"0": -0.2, "1": -0.1, "2": -0.1})
    assert found["minus_taylor"].isna().all()


def test_signs_are_counted_over_settings_and_units():
    parts = []
    for allocation, gap in (("global", 0.1), ("uniform", -0.2)):
        for i in range(2):
            parts.append(level("cap", 0.5 + gap + 0.15 * i, str(i), allocation=allocation))
            parts.append(level("magnitude", 0.5, str(i), allocation=allocation))
    found = statistics.sign_summary(statistics.gaps(statistics.areas(recovered(*parts), ["cap", "magnitude"])))
    row = found.iloc[0]
    assert (row["settings"], row["positive_settings"], row["units"], row["positive_units"]) == (2, 1, 4, 2)
    assert row["mean"] == pytest.approx((0.175 - 0.125) / 2)


def test_accuracy_before_recovery_is_one_curve_for_all_recoveries_and_failed_cells_are_none():
    parts = [level("cap", 0.5), level("cap", 0.6, recovery="adam"), level("magnitude", 0.4, error="RuntimeError: x")]
    curves = statistics.accuracy_curves(pd.concat(parts))
    assert curves.groupby("recovery").size().to_dict() == {"adam": 2, "none": 2, "sgd": 2}
    assert set(curves.loc[curves["recovery"] == "none", "accuracy"]) == {0.1} and set(curves["method"]) == {"cap"}


def test_weight_sweeps_start_at_magnitude_and_share_an_interval_of_their_own():
    parts = [level("magnitude", 0.3), level("magnitude_plus_ix(0.5)", 0.4), level("ix_minus_redundancy(0.25)", 0.7)]
    found = statistics.weight_sweeps(recovered(*parts, cells_of("cap", [(0.91, 1), (0.95, 1)])))
    rows = found[["family", "weight", "mean"]].to_numpy().tolist()
    assert rows == [
        ["ix_minus_redundancy", 0.25, pytest.approx(0.7)],
        ["magnitude_plus_ix", 0.0, pytest.approx(0.3)],
        ["magnitude_plus_ix", 0.5, pytest.approx(0.4)],
    ]


def test_recovery_budgets_go_from_the_pruned_network_through_the_checks_to_the_end():
    cells = pd.concat([level("cap", h, str(i)).assign(accuracy_batches_50=0.2) for i, h in enumerate((0.4, 0.6))])
    found = statistics.recovery_budgets(cells)
    means = found[found["sparsity"] == 0.1].set_index("batches")["mean"]
    assert means.to_dict() == pytest.approx({0: 0.1, 50: 0.2, 200: 0.5})


def test_allocations_are_compared_over_the_interval_that_they_share():
    line = [(0.0, 1.0), (1.0, 0.0)]
    parts = [cells_of("cap", line), cells_of("cap", [(0.4, 0.6), (1.0, 0.0)], allocation="uniform")]
    found = statistics.rule_ablation(recovered(*parts), ["cap"])
    assert found.set_index("allocation")["mean"].to_dict() == pytest.approx({"global": 0.3, "uniform": 0.3})
    assert statistics.rule_ablation(recovered(parts[0]), ["cap"]).empty
