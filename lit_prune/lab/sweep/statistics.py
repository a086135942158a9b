"""Statistics of a sweep: areas under accuracy curves over MACs removed, gaps between axes, the choice of a score.

A curve is accuracy over the share of multiply-adds removed, of one method in one run (a checkpoint and a seed of
draws) and one setting (allocation, removal, recovery). Methods are compared within a setting, paired by unit: the
checkpoint where there are several, else the seed; a unit with several runs counts with their mean.

Source: the two-axis paper, section 4.2, appendices C, F, H, J and P.
"""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from lit_prune.errors import InputError
from lit_prune.measurement.summaries import unit_bootstrap

SETTING = ["allocation", "removal", "recovery"]
RUN = ["checkpoint", "seed"]
CURVE = [*SETTING, "method", "axis", "unit", *RUN]
COMPARISONS = (
    ("best local", "best target"),
    ("best local", "magnitude"),
    ("best local", "taylor"),
    ("best local", "chip"),
    ("best mixed", "magnitude"),
    ("hybrid", "best local"),
)
RIVALS = ("best target", "magnitude", "taylor", "chip", "best local")
WEIGHTED = re.compile(r"(magnitude_plus_ix|ix_minus_redundancy)\(([-+.\deE]+)\)")


def accuracy_curves(cells: pd.DataFrame) -> pd.DataFrame:
    """Points of all curves: the accuracy after each recovery, and as recovery `none` the one before any.

    Args:
        cells: table of a sweep, `sweep.parquet`; failed cells are left out.

    Returns:
        Columns `CURVE`, sparsity, macs_removed, accuracy.
    """
    done = cells[cells["error"].isna()]
    points = [*CURVE, "sparsity", "macs_removed"]
    after = done[done["recovery"] != "none"].assign(accuracy=lambda rows: rows["accuracy_after"])
    before = done.drop_duplicates([*SETTING[:2], "method", *RUN, "sparsity"])  # it is the same for every recovery
    before = before.assign(recovery="none", accuracy=before["accuracy_before"])
    return pd.concat([before, after], ignore_index=True)[[*points, "accuracy"]]


def area_under(flops: Sequence[float], accuracy: Sequence[float], low: float, high: float) -> float:
    """Mean accuracy over [low, high]: the trapezoid of the curve through the points, divided by the length.

    Points with equal MACs count with their mean; at the ends of the interval the curve is interpolated.

    Args:
        flops: share of multiply-adds removed at each point, any order.
        accuracy: at each point, 0 to 1.
        low: lower end, at least the smallest of `flops`.
        high: upper end, above `low`, at most the largest of `flops`.
    """
    points = pd.Series(np.asarray(accuracy, dtype=float)).groupby(np.asarray(flops, dtype=float)).mean()
    places = points.index.to_numpy()
    inside = places[(places > low) & (places < high)]
    knots = np.concatenate([[low], inside, [high]])
    return float(np.trapezoid(np.interp(knots, places, points.to_numpy()), knots) / (high - low))


def common_interval(curves: pd.DataFrame) -> tuple[float, float]:
    """The interval of MACs removed that every curve covers.

    Raises:
        InputError: there is none; the methods that are the reason are named.
    """
    spans = curves.groupby(["method", *RUN, *SETTING])["macs_removed"].agg(["min", "max"])
    low, high = spans["min"].max(), spans["max"].min()
    if not high > low:
        late, early = spans["min"].idxmax(), spans["max"].idxmin()
        raise InputError(
            f"methods: no interval of MACs removed is shared: {late[0]!r} ({_where(late)}) begins at {low:.3f},"
            f" {early[0]!r} ({_where(early)}) ends at {high:.3f}; leave one of them out, or give more sparsities"
        )
    return float(low), float(high)


def _where(key: tuple) -> str:
    """Seed and setting of a curve, for an error."""
    return f"seed {key[2]}, {' '.join(key[3:])}"


def areas(curves: pd.DataFrame, methods: Sequence[str], together: Sequence[str] = SETTING) -> pd.DataFrame:
    """Area under each method's curve over the interval shared by all of `methods`.

    Args:
        curves: see `accuracy_curves`.
        methods: those to compare.
        together: the columns within which one interval is shared; `removal` and `recovery` alone compare allocations.

    Returns:
        One row a setting, method and unit: columns of `SETTING`, method, axis, unit, auc, low, high (the interval).

    Raises:
        InputError: no shared interval.
    """
    rows = []
    for _, group in curves[curves["method"].isin(methods)].groupby(list(together), sort=False):
        low, high = common_interval(group)
        for key, points in group.groupby(CURVE, sort=False):
            area = area_under(points["macs_removed"], points["accuracy"], low, high)
            rows.append(dict(zip(CURVE, key, strict=True)) | {"auc": area, "low": low, "high": high})
    runs = pd.DataFrame(rows, columns=[*CURVE, "auc", "low", "high"])
    return runs.groupby([*SETTING, "method", "axis", "unit"], sort=False)[["auc", "low", "high"]].mean().reset_index()


def summarise(values: pd.DataFrame, by: Sequence[str], column: str) -> pd.DataFrame:
    """Mean of `column` over units (column `unit`) and its 95 % bootstrap interval, for groups of equal `by`.

    Returns:
        Columns `by`, units, mean, ci_low, ci_high; the interval is NaN where there is one unit.
    """
    rows = []
    for key, group in values.groupby(list(by), sort=False, dropna=False):
        rows.append(dict(zip(by, key, strict=True)) | _interval(group[column], group["unit"]))
    return pd.DataFrame(rows, columns=[*by, "units", "mean", "ci_low", "ci_high"])


def _interval(values: pd.Series, units: pd.Series) -> dict[str, float | int]:
    found, count = unit_bootstrap(values, units), units.nunique()
    ends = (found.low, found.high) if count > 1 else (np.nan, np.nan)
    return {"units": count, "mean": found.mean, "ci_low": ends[0], "ci_high": ends[1]}


def gaps(aucs: pd.DataFrame) -> pd.DataFrame:
    """Paired differences of areas between axes and baselines, with 95 % bootstrap intervals over units.

    The best of an axis is its method with the largest mean over units, the same for all of them. A comparison whose
    methods the sweep does not have, or of a method with itself, is left out.

    Returns:
        One row a setting and comparison: first, second (the methods), units, mean, ci_low, ci_high (of first minus
        second), positive (units in which it is above 0).
    """
    rows = []
    for setting, group in aucs.groupby(SETTING, sort=False):
        table = group.pivot(index="unit", columns="method", values="auc")
        axes = group.drop_duplicates("method").set_index("method")["axis"]
        for pair in COMPARISONS:
            first, second = (_resolve(name, table, axes) for name in pair)
            if first is None or second is None or first == second:
                continue
            difference = (table[first] - table[second]).dropna()
            fields = {"comparison": " – ".join(pair), "first": first, "second": second}
            found = _interval(difference, pd.Series(difference.index, index=difference.index))
            rows.append(
                dict(zip(SETTING, setting, strict=True)) | fields | found | {"positive": int((difference > 0).sum())}
            )
    columns = [*SETTING, "comparison", "first", "second", "units", "mean", "ci_low", "ci_high", "positive"]
    return pd.DataFrame(rows, columns=columns)


def _resolve(name: str, table: pd.DataFrame, axes: pd.Series) -> str | None:
    """The method that a name such as `best local` or `taylor` stands for."""
    if not name.startswith("best "):
        return name if name in table else None
    means = table[axes.index[axes == name.removeprefix("best ")]].mean()
    return means.idxmax() if means.notna().any() else None


def sign_summary(found: pd.DataFrame) -> pd.DataFrame:
    """How often each comparison is positive over settings and over their units, and its mean over settings."""
    grouped = found.groupby("comparison", sort=False)
    return pd.DataFrame(
        {
            "settings": grouped.size(),
            "positive_settings": grouped["mean"].agg(lambda means: int((means > 0).sum())),
            "units": grouped["units"].sum(),
            "positive_units": grouped["positive"].sum(),
            "mean": grouped["mean"].mean(),
        }
    ).reset_index()


def select_leave_one_out(aucs: pd.DataFrame) -> pd.DataFrame:
    """For each unit the local score that is best on the other units, and what it gains on this one.

    Returns:
        One row a setting and held-out unit: chosen, auc, and `minus_<rival>` for the best target score and the best
        local score of this very unit (the oracle), magnitude, taylor and chip. Empty with fewer than two units.
    """
    rows = []
    for setting, group in aucs.groupby(SETTING, sort=False):
        table = group.pivot(index="unit", columns="method", values="auc")
        axes = group.drop_duplicates("method").set_index("method")["axis"]
        local = list(axes.index[axes == "local"])
        for unit in table.index if len(table) > 1 and local else ():
            chosen = table.loc[table.index != unit, local].mean().idxmax()
            own = table.loc[[unit]]
            found = {name: _resolve(name, own, axes) for name in RIVALS}
            minus = {
                f"minus_{name.replace(' ', '_')}": own.at[unit, chosen] - own.at[unit, rival] if rival else np.nan
                for name, rival in found.items()
            }
            row = {"unit": unit, "chosen": chosen, "auc": own.at[unit, chosen]}
            rows.append(dict(zip(SETTING, setting, strict=True)) | row | minus)
    names = [f"minus_{name.replace(' ', '_')}" for name in RIVALS]
    return pd.DataFrame(rows, columns=[*SETTING, "unit", "chosen", "auc", *names])


def weight_sweeps(curves: pd.DataFrame) -> pd.DataFrame:
    """Area against the weight of magnitude + α·I_X and I_X - β·R̄_X, over the interval that all of these share.

    Magnitude alone is α = 0 where the sweep has it.

    Returns:
        Columns of `SETTING`, family, weight, units, mean, ci_low, ci_high; empty where no weighted method is there.

    Raises:
        InputError: no shared interval.
    """
    names = [name for name in dict.fromkeys(curves["method"]) if WEIGHTED.fullmatch(name)]
    columns = [*SETTING, "family", "weight", "units", "mean", "ci_low", "ci_high"]
    if not names:
        return pd.DataFrame(columns=columns)
    found = summarise(areas(curves, [*names, "magnitude"]), [*SETTING, "method"], "auc")
    pairs = [m.groups() if (m := WEIGHTED.fullmatch(n)) else ("magnitude_plus_ix", 0) for n in found["method"]]
    found = found.assign(family=[family for family, _ in pairs], weight=[float(weight) for _, weight in pairs])
    return found.sort_values([*SETTING, "family", "weight"], kind="stable", ignore_index=True)[columns]


def recovery_budgets(cells: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of each method and sparsity after each number of recovery batches measured, 0 included.

    Returns:
        Columns of `SETTING`, method, sparsity, batches, units, mean, ci_low, ci_high.
    """
    done = cells[cells["error"].isna() & (cells["recovery"] != "none")]
    checks = [name for name in cells if name.startswith("accuracy_batches_")]
    untrained = done["accuracy_before"]
    if "accuracy_repaired" in done:
        untrained = done["accuracy_repaired"].fillna(untrained)
    parts = [done.assign(batches=0, accuracy=untrained)]
    parts += [done.assign(batches=int(name.rsplit("_", 1)[1]), accuracy=done[name]) for name in checks]
    parts += [done.assign(accuracy=done["accuracy_after"])[done["batches"] > 0]]
    points = pd.concat(parts, ignore_index=True).dropna(subset="accuracy")
    return summarise(points, [*SETTING, "method", "sparsity", "batches"], "accuracy")


def rule_ablation(curves: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """The same scores under each allocation, over the interval that all allocations share.

    Returns:
        Columns of `SETTING`, method, axis, units, mean, ci_low, ci_high of the area; empty with one allocation.

    Raises:
        InputError: no shared interval.
    """
    by = [*SETTING, "method", "axis"]
    if curves["allocation"].nunique() < 2:
        return pd.DataFrame(columns=[*by, "units", "mean", "ci_low", "ci_high"])
    return summarise(areas(curves, methods, ["removal", "recovery"]), by, "auc")
