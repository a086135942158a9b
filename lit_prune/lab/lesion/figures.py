"""Figures and tables of lesions: damage on the axes, recovery by peers, one score against two axes."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lit_prune.lab.lesion.statistics import THRESHOLDS
from lit_prune.measurement.summaries import live_rows, rank_correlation
from lit_prune.report import drawing
from lit_prune.report.drawing import Picture, new_figure
from lit_prune.report.run_folder import AbsentInput, RunFolder
from lit_prune.report.sections import register_section

COLUMNS = ("layer", "depth", "third", "channel", "damage", "recovery", "peer_r2", "input_capture", "task_information")
THIRD_COLOURS = {"shallow": drawing.ORANGE, "mid": drawing.GREEN, "deep": drawing.BLUE}
AXES = {
    "input_capture": "input capture $I_X$ (nats)",
    "peer_overlap": r"peer overlap $\bar R_X$ (nats)",
    "task_information": "task information $I_T$ (nats)",
    "peer_r2": "peer $R^2$",
}
LOWEST_RECOVERY, HIGHEST_RECOVERY = -1.0, 1.5
SMALL = 1e-3  # nats; the damage axis is linear below
KEPT = 0.5


@register_section("damage", "Lesions", place=170)
def draw_damage(run: RunFolder) -> Picture:
    """Draws the damage of lesions against each axis and peer R²."""
    lesions = _lesions(run)
    figure = new_figure(6.2)
    grid = figure.subplots(2, 2, sharey=True)
    for axes, (name, label) in zip(grid.flat, AXES.items(), strict=True):
        _scatter_thirds(axes, lesions[name], lesions["damage"], lesions["third"])
        axes.set_yscale("symlog", linthresh=SMALL)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(label)
        within = [rank_correlation(rows[name], rows["damage"]) for _, rows in lesions.groupby("layer", sort=False)]
        axes.set_title(f"ρ with damage, mean over layers: {_mean(within):.2f}", fontsize=10)
    for axes in grid[:, 0]:
        axes.set_ylabel("damage $ΔL$ (nats)")
    names = {"ncols": 3, "title": "third of the depth", "title_fontsize": 9, "fontsize": 9, "handletextpad": 0.1}
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", **names)
    return Picture(
        figure,
        f"One dot a lesioned channel: the rise of the mean loss when its raw output is set to zero, nothing trained "
        f"(logarithmic above {SMALL:g} nats, linear below). A flat cloud: that quantity does not say what a channel's "
        "removal costs.",
    )


@register_section("recovery", "Replacement by peers", place=190)
def draw_recovery(run: RunFolder) -> Picture:
    """Draws recovery by peer replacement against peer R², and its distribution above each threshold."""
    lesions = _lesions(run)
    some = lesions[lesions["damage"] > THRESHOLDS[1]].dropna(subset=["recovery", "peer_r2"])
    if not len(some):
        raise AbsentInput(f"a lesion that does more damage than {THRESHOLDS[1]:g} nats")
    figure = new_figure(4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    shown = some["recovery"].clip(LOWEST_RECOVERY, HIGHEST_RECOVERY)
    _scatter_thirds(left, some["peer_r2"], shown, some["third"])
    for height in (0, 1):
        left.axhline(height, color=drawing.GREY, linewidth=0.8, linestyle="--", zorder=0)
    rho = rank_correlation(some["peer_r2"], some["recovery"])
    left.set_title(f"damage above {THRESHOLDS[1]:g}: {len(some)} channels, ρ = {rho:.2f}", fontsize=10)
    left.set(xlabel="peer $R^2$", ylabel="recovered share of the damage")
    left.set_ylim(LOWEST_RECOVERY - 0.08, HIGHEST_RECOVERY + 0.08)
    left.legend(loc="lower right", fontsize=9, handletextpad=0.1)
    _draw_distributions(right, lesions)
    return Picture(
        figure,
        "A channel is replaced by the linear reconstruction from its most correlated peers; 1: all of the lesion's "
        "damage is undone, below 0: the stand-in does more harm than the lesion. Values beyond the axis are drawn at "
        "its ends. Right: share of the channels with at most that recovery, by least damage.",
    )


@register_section("selection", "One score against two axes", place=220)
def draw_selection(run: RunFolder) -> Picture:
    """Draws which half of a layer's channels weight norm keeps and which the two axes keep."""
    try:
        table, source = run.table("channels.parquet", ["layer", "depth", "weight_norm", *list(AXES)[:3]]), "analysed"
    except AbsentInput:
        table, source = run.table("lesions.parquet", ["layer", "depth", "weight_norm", *list(AXES)[:3]]), "lesioned"
    live = live_rows(table).dropna(subset=list(AXES)[:3])
    if not len(live):
        raise AbsentInput("live channels")
    layers = live.groupby("layer", sort=False)
    shares = {layer: float((keep_by_norm(rows) != keep_by_axes(rows)).mean()) for layer, rows in layers}
    layer = layers.size().idxmax()
    rows = live[live["layer"] == layer].sort_values("weight_norm", ascending=False).reset_index(drop=True)
    figure = new_figure(4.0)
    left, right = figure.subplots(1, 2)
    kept = keep_by_norm(rows).to_numpy()
    left.bar(
        np.arange(len(rows)), rows["weight_norm"], width=1.0, color=np.where(kept, drawing.VERMILLION, drawing.PALE)
    )
    left.set(xlabel="rank by weight norm", ylabel=r"$\|w\|$", title=f"{layer}: one axis")
    left.grid(axis="x", visible=False)
    _draw_decisions(right, rows, kept)
    mean = np.mean(list(shares.values()))
    right.set_title(f"two axes: {shares[layer]:.0%} disagree ({mean:.0%} over {len(shares)} layers)")
    return Picture(
        figure,
        f"The {source} layer with the most channels. Left: the half of largest weight norm is kept (red). Right: the "
        "same channels on the two axes; circles are kept and crosses dropped by the sum of the ranks of input capture "
        "and task information in the layer. Red crosses and grey circles: the two decisions disagree.",
    )


def keep_by_norm(rows: pd.DataFrame) -> pd.Series:
    """The half of a layer's channels of largest weight norm."""
    return rows["weight_norm"].rank(method="first", ascending=False) <= KEPT * len(rows)


def keep_by_axes(rows: pd.DataFrame) -> pd.Series:
    """The half of a layer's channels with the largest sum of ranks on the two axes."""
    ranks = rows[["input_capture", "task_information"]].rank().sum(axis=1)
    return ranks.rank(method="first", ascending=False) <= KEPT * len(rows)


def _draw_decisions(axes: Axes, rows: pd.DataFrame, kept: np.ndarray) -> None:
    both = keep_by_axes(rows).to_numpy()
    for of_two, marker, size in ((True, "o", 26), (False, "x", 30)):
        for of_one, colour in ((True, drawing.VERMILLION), (False, drawing.GREY)):
            some = rows[(both == of_two) & (kept == of_one)]
            x, y = some["input_capture"], some["task_information"]
            axes.scatter(x, y, marker=marker, s=size, color=colour, linewidths=0.4 if of_two else 1.3)
    axes.set(xlabel=AXES["input_capture"], ylabel=AXES["task_information"])


def _draw_distributions(axes: Axes, lesions: pd.DataFrame) -> None:
    for threshold, colour in zip(THRESHOLDS, (drawing.ORANGE, drawing.GREEN, drawing.BLUE), strict=True):
        values = np.sort(lesions.loc[lesions["damage"] > threshold, "recovery"].dropna())
        if len(values):
            heights = np.arange(1, len(values) + 1) / len(values)
            label = f"above {threshold:g}: median {np.median(values):.2f}"
            axes.step(np.clip(values, LOWEST_RECOVERY, None), heights, where="post", color=colour, label=label)
    axes.axvline(0, color=drawing.GREY, linewidth=0.8, linestyle="--", zorder=0)
    axes.set(xlabel="recovered share of the damage", ylabel="share of channels", ylim=(0, 1.02))
    axes.set_xlim(LOWEST_RECOVERY, HIGHEST_RECOVERY)
    axes.legend(loc="upper left", fontsize=8.5)


def _scatter_thirds(axes: Axes, x: pd.Series, y: pd.Series, thirds: pd.Series) -> None:
    for third, colour in THIRD_COLOURS.items():
        some = thirds == third
        if some.any():
            axes.scatter(x[some], y[some], color=colour, s=16, linewidths=0.3, edgecolors=drawing.HALO, label=third)


def _lesions(run: RunFolder) -> pd.DataFrame:
    table = live_rows(run.table("lesions.parquet", [*COLUMNS, "peer_overlap"]))
    if not len(table):
        raise AbsentInput("lesions of live channels")
    return table


def _mean(values: list[float]) -> float:
    finite = [value for value in values if value == value]
    return float(np.mean(finite)) if finite else float("nan")
