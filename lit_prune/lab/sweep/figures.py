"""Figures and tables of a sweep: accuracy over MACs removed, gaps between axes, weight sweeps, allocations.

Every panel, bar and column is named by its setting, so that masked results are never taken for physical ones.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lit_prune.lab.sweep.statistics import SETTING, accuracy_curves, summarise
from lit_prune.report import drawing
from lit_prune.report.drawing import Picture, new_figure
from lit_prune.report.run_folder import RunFolder
from lit_prune.report.sections import register_section
from lit_prune.report.tables import ABSENT, Entry, Table

COLOURS = {
    "local": drawing.BLUE,
    "target": drawing.ORANGE,
    "mixed": drawing.GREEN,
    "baseline": drawing.GREY,
}
AXIS_NAMES = {"local": "local axis", "target": "target axis", "mixed": "mixed", "baseline": "baseline"}
BASELINE_LINES = {"magnitude": "--", "taylor": "-."}
FAMILIES = {
    "magnitude_plus_ix": ("α", r"$\|w\| + \alpha\, I_X$"),
    "ix_minus_redundancy": ("β", r"$I_X - \beta\, \bar R_X$"),
}
SETTING_COLOURS = (drawing.BLUE, drawing.ORANGE, drawing.GREEN, drawing.VERMILLION, drawing.INK, drawing.GREY)
CELLS = "sweep.parquet"


def setting_name(setting: Sequence[str]) -> str:
    """A setting in words: allocation, removal, what came after."""
    allocation, removal, recovery = setting
    recovery = recovery.replace("_", ", then ")
    removed = "masked (not removed)" if removal == "mask" else removal
    return f"{allocation}, {removed}, {'no recovery' if recovery == 'none' else f'{recovery} recovery'}"


@register_section("sweep", "Scores under the pruning protocol", place=270)
def draw_sweep(run: RunFolder) -> Picture:
    """Draws accuracy over the share of MACs removed, one panel a setting."""
    cells, aucs = run.table(CELLS, ["method", "accuracy_before"]), run.table("sweep/auc.parquet", [*SETTING, "auc"])
    curves = accuracy_curves(cells)
    curves = curves[curves["method"].isin(aucs["method"])]
    dense = cells["accuracy_dense"].dropna().unique()
    settings = list(curves.groupby(SETTING, sort=False))
    rows = -(-len(settings) // 2)
    figure = new_figure(0.5 + 3.7 * rows)
    panels = figure.subplots(rows, min(2, len(settings)), squeeze=False, sharex=True, sharey=True).ravel()
    for panel in panels[len(settings) :]:
        panel.set_visible(False)
    for panel, (setting, points) in zip(panels, settings, strict=False):
        own = aucs[(aucs[SETTING] == list(setting)).all(axis=1)]
        _draw_setting(panel, points, own, dense)
        panel.set_title(setting_name(setting))
    axes = dict.fromkeys(curves["axis"])
    handles = [Line2D([], [], color=COLOURS[axis], label=AXIS_NAMES[axis]) for axis in axes]
    handles.append(Line2D([], [], color=drawing.INK, linestyle=":", label="dense"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    figure.supxlabel("share of MACs removed (%)", fontsize=10)
    figure.supylabel("accuracy (%)", fontsize=10)
    return Picture(
        figure,
        "Accuracy against the share of MACs removed. Strong lines: magnitude, taylor, the best of each axis by AUC; "
        "pale lines: the other scores. Bars: 95 % bootstrap interval over units. Grey field: the interval that all "
        "scores cover, over which areas are taken. Dotted: the dense network.",
    )


def _draw_setting(axes: Axes, points: pd.DataFrame, aucs: pd.DataFrame, dense: Sequence[float]) -> None:
    """All curves of one setting."""
    axes.axvspan(100 * aucs["low"].min(), 100 * aucs["high"].max(), color=drawing.PALE, alpha=0.35, linewidth=0)
    for accuracy in dense:
        axes.axhline(100 * accuracy, color=drawing.INK, linestyle=":", linewidth=1)
    named = _named_methods(aucs)
    for (method, axis), curve in points.groupby(["method", "axis"], sort=False):
        found = summarise(curve, ["sparsity"], "accuracy").set_index("sparsity")
        x = 100 * curve.groupby("sparsity", sort=False)["macs_removed"].mean()[found.index]
        y, colour = 100 * found["mean"], COLOURS[axis]
        if method not in named:
            axes.plot(x, y, color=colour, linewidth=0.9, alpha=0.45)
            continue
        style = {"color": colour, "linestyle": BASELINE_LINES.get(method, "-"), "linewidth": 1.6, "label": method}
        axes.errorbar(x, y, 100 * _spread(found), marker="o", markersize=3, elinewidth=1, **style)
    look = {"frameon": True, "facecolor": "white", "edgecolor": "none", "framealpha": 0.8}
    axes.legend(loc="upper right", fontsize=8, labelcolor="linecolor", handlelength=2.6, **look)
    axes.set_ylim(bottom=0)


def _spread(found: pd.DataFrame) -> np.ndarray:
    """Distances of the interval's ends from the mean, [2, n]; 0 where there is no interval."""
    ends = found[["ci_low", "ci_high"]].sub(found["mean"], axis=0).fillna(0)
    return np.abs(ends.to_numpy().T)


def _named_methods(aucs: pd.DataFrame) -> set[str]:
    """The methods to draw strongly."""
    means = aucs.groupby(["axis", "method"])["auc"].mean()
    best = {means[axis].idxmax() for axis in means.index.unique("axis") if axis != "baseline"}
    return best | (set(BASELINE_LINES) & set(aucs["method"]))


@register_section("sweep_gaps", "Gaps between the axes", place=290)
def draw_sweep_gaps(run: RunFolder) -> Picture:
    """Draws the paired differences of areas, one bar a comparison and setting."""
    gaps = run.table("sweep/gaps.parquet", [*SETTING, "comparison", "mean", "ci_low", "ci_high"])
    comparisons, colours = list(dict.fromkeys(gaps["comparison"])), _setting_colours(gaps)
    figure = new_figure(1.2 + (0.24 * len(colours) + 0.25) * len(comparisons))
    axes = figure.subplots()
    axes.axvline(0, color=drawing.GREY, linewidth=0.8)
    height = 0.8 / len(colours)
    for number, (setting, colour) in enumerate(colours.items()):
        own = gaps[(gaps[SETTING] == list(setting)).all(axis=1)].set_index("comparison")
        rows = np.array([comparisons.index(name) for name in own.index]) + (number + 0.5) * height - 0.4
        axes.barh(rows, 100 * own["mean"], 0.85 * height, color=colour, label=setting_name(setting))
        axes.errorbar(100 * own["mean"], rows, xerr=100 * _spread(own), fmt="none", ecolor=drawing.INK, elinewidth=1)
    axes.set_yticks(range(len(comparisons)), comparisons)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="difference of AUC (points)", ylim=(len(comparisons) - 0.45, -0.55))
    figure.legend(loc="outside upper center", ncols=min(2, len(colours)), fontsize=9)
    units = f"{gaps['units'].min()} to {gaps['units'].max()}" if gaps["units"].nunique() > 1 else gaps["units"].iloc[0]
    return Picture(
        figure,
        f"Paired differences of the areas under the curves, {units} units; lines: 95 % bootstrap interval over units "
        "(none with one unit). The best of an axis is its score with the largest mean area.",
    )


@register_section("sweep_weights", "Weights of mixed scores", place=310)
def draw_sweep_weights(run: RunFolder) -> Picture:
    """Draws the area against the weight in magnitude + α·I_X and I_X - β·R̄_X."""
    table = run.table("sweep/weights.parquet", [*SETTING, "family", "weight", "mean"])
    families, colours = [name for name in FAMILIES if name in set(table["family"])], _setting_colours(table)
    figure = new_figure(3.9)
    panels = figure.subplots(1, len(families), squeeze=False, sharey=True)[0]
    for axes, family in zip(panels, families, strict=True):
        for setting, colour in colours.items():
            own = table[(table[SETTING] == list(setting)).all(axis=1) & (table["family"] == family)]
            look = {"color": colour, "marker": "o", "markersize": 4, "elinewidth": 1}
            axes.errorbar(own["weight"], 100 * own["mean"], 100 * _spread(own), label=setting_name(setting), **look)
        axes.set(xlabel=f"weight {FAMILIES[family][0]}", title=FAMILIES[family][1])
    panels[0].set_ylabel("AUC (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(2, len(colours)), fontsize=9)
    return Picture(
        figure,
        "Area under the accuracy curve over MACs removed as the weight of the second term grows, over the interval "
        "that all these scores cover; lines: 95 % bootstrap interval over units. Weight 0 on the left is magnitude.",
    )


def _setting_colours(table: pd.DataFrame) -> dict[tuple[str, ...], str]:
    """A colour for each setting, in the order of the table."""
    settings = table[SETTING].drop_duplicates().itertuples(index=False, name=None)
    return dict(zip(settings, itertools.cycle(SETTING_COLOURS), strict=False))


@register_section("sweep_areas", "Areas under the curves", place=280)
def tabulate_sweep(run: RunFolder) -> Table:
    """Returns the areas: one row a method, one column a setting, sorted by axis and area."""
    return area_table(run.table("sweep/auc.parquet", [*SETTING, "auc"]))


def area_table(aucs: pd.DataFrame) -> Table:
    """The same of the table `auc`."""
    found = summarise(aucs, [*SETTING, "method", "axis"], "auc")
    caption = (
        "Area under accuracy over MACs removed, over the interval that all scores of one column cover; in small type "
        "the 95 % bootstrap interval over units. Columns have intervals of their own."
    )
    return _area_table(found, caption)


@register_section("sweep_rules", "Allocation rules", place=300)
def tabulate_sweep_rules(run: RunFolder) -> Table:
    """Returns the same scores under every allocation, over the interval that the allocations share."""
    found = run.table("sweep/rules.parquet", [*SETTING, "method", "mean"])
    caption = (
        "The same scores under each allocation, over the interval of MACs removed that all allocations cover: along "
        "a row the score is the same and only the rule changes; without recovery nothing was trained after pruning."
    )
    return _area_table(found, caption)


def _area_table(found: pd.DataFrame, caption: str) -> Table:
    settings = list(found[SETTING].drop_duplicates().itertuples(index=False, name=None))
    means = found.groupby(["axis", "method"])["mean"].mean().reset_index()
    means["axis"] = pd.Categorical(means["axis"], list(COLOURS))
    by = found.set_index([*SETTING, "method"])
    rows = []
    for entry in means.sort_values(["axis", "mean"], ascending=[True, False]).itertuples():
        cells = [_area_cell(by, (*setting, entry.method)) for setting in settings]
        rows.append((Entry(AXIS_NAMES[entry.axis]), Entry(entry.method), *cells))
    return Table(("axis", "score", *map(setting_name, settings)), tuple(rows), caption, text_columns=2)


def gap_table(gaps: pd.DataFrame) -> Table:
    """Gaps between axes in points of accuracy, one row a comparison, one column a setting."""
    settings = list(gaps[SETTING].drop_duplicates().itertuples(index=False, name=None))
    by = gaps.set_index([*SETTING, "comparison"])
    rows = tuple(
        (Entry(name), *(_area_cell(by, (*setting, name), 100.0, "+.1f") for setting in settings))
        for name in dict.fromkeys(gaps["comparison"])
    )
    return Table(("comparison", *map(setting_name, settings)), rows, "Below: the 95 % bootstrap interval over units.")


def _area_cell(by: pd.DataFrame, key: tuple[str, ...], scale: float = 1.0, digits: str = ".3f") -> Entry:
    if key not in by.index:
        return Entry(ABSENT)
    row = by.loc[key]
    mean, low, high = (format(scale * row[name], digits) for name in ("mean", "ci_low", "ci_high"))
    return Entry(mean, "" if np.isnan(row["ci_low"]) else f"{low} to {high}", repr(float(row["mean"])))
