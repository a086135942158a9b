"""Figures of an analysed checkpoint: metrics against each other, groups, graphs, hulls, triplets, propagation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lit_prune.lab.analyze.propagation import METRICS as ROUTED
from lit_prune.measurement.summaries import METRICS, axis_matrix, collapse, live_rows
from lit_prune.report import drawing
from lit_prune.report.drawing import Picture, new_figure
from lit_prune.report.run_folder import AbsentInput, RunFolder
from lit_prune.report.sections import register_section

SYMBOLS = {
    "input_capture": "$I_X$",
    "peer_overlap": r"$\bar R_X$",
    "weight_norm": r"$\|w\|^2$",
    "task_information": "$I_T$",
    "target_redundancy": r"$\mathrm{Red}_T$",
    "target_excess": "Syn",
}
NAMED_LAYERS = 60
SCATTERED = 6000


@register_section("matrix", "Six metrics against each other", place=100)
def draw_matrix(run: RunFolder) -> Picture:
    """Draws the 6×6 rank correlations of the channel metrics, ranked within each layer."""
    matrix = axis_matrix(run.table("channels.parquet", ["layer", *METRICS]))
    figure = new_figure(4.6)
    figure.set_layout_engine("compressed")  # keeps the colour bar beside the square
    axes = figure.subplots()
    image = _draw_heat(axes, matrix)
    for line in (axes.axhline, axes.axvline):
        line(2.5, color=drawing.INK, linewidth=1.5)
    figure.colorbar(image, ax=axes, label="Spearman ρ")
    return Picture(
        figure,
        "Rank correlations of six channel metrics after ranking within each layer. Upper left: the local axis; lower "
        "right: the target axis. Two axes are there where these blocks are coloured and the other two are pale.",
    )


def _draw_heat(axes: Axes, matrix: pd.DataFrame, limit: float = 1.0) -> Any:
    """A square of correlations with their values."""
    values = matrix.to_numpy(dtype=float)
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
    for (row, column), value in np.ndenumerate(values):
        colour = drawing.ON_DARK if abs(value) > 0.6 * limit else drawing.ON_LIGHT
        axes.text(column, row, _two_digits(value), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(matrix.columns)), [SYMBOLS[name] for name in matrix.columns])
    axes.set_yticks(range(len(matrix)), [SYMBOLS[name] for name in matrix.index])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return image


def _two_digits(value: float) -> str:
    """The value with a true minus sign, and none before zero; a dash for NaN."""
    return "–" if value != value else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


@register_section("collapse", "Target redundancy against task information", place=110)
def draw_collapse(run: RunFolder) -> Picture:
    """Draws target redundancy against task information of every channel."""
    columns = ["layer", "depth", "task_information", "target_redundancy"]
    table = live_rows(run.table("channels.parquet", columns)).dropna(subset=columns)
    table = table[(table["task_information"] > 0) & (table["target_redundancy"] > 0)]
    if not len(table):
        raise AbsentInput("live channels in channels.parquet")
    ranks = pd.Series([collapse(rows) for _, rows in table.groupby("layer")]).mean()
    shown = table.iloc[:: -(-len(table) // SCATTERED)]
    figure = new_figure(4.4)
    axes = figure.subplots()
    x, y = shown["task_information"], shown["target_redundancy"]
    scatter = axes.scatter(x, y, c=shown["depth"], cmap=drawing.OVERLAP_COLOURS, s=10, lw=0.2, edgecolors=drawing.HALO)
    ends = np.quantile(np.concatenate([x, y]), [0.01, 1])
    axes.plot(ends, ends, color=drawing.GREY, linewidth=1, linestyle="--", zorder=0)
    axes.set(xscale="log", yscale="log", xlim=(ends[0], ends[1] * 1.2), ylim=(ends[0], ends[1] * 1.2))
    axes.set(xlabel="task information $I_T$ (nats)", ylabel=r"target redundancy $\mathrm{Red}_T$ (nats)")
    axes.set_title(f"mean ρ within layers: {ranks:.3f}")
    figure.colorbar(scatter, ax=axes, label="depth of the layer", ticks=MaxNLocator(integer=True))
    return Picture(
        figure,
        "One dot a channel, both axes logarithmic. Target redundancy is the smaller of two task informations, so it "
        "follows a channel's own (dashed: equal) until it reaches that of its partners, and says nothing of peers.",
    )


@register_section("depth", "Coupling by depth", place=120)
def draw_depth(run: RunFolder) -> Picture:
    """Draws the coupling of the two axes layer by layer."""
    layers = run.table("layers.parquet", ["layer", "depth", "coupling"])
    figure = new_figure(3.6)
    axes = figure.subplots()
    axes.axhline(0, color=drawing.GREY, linewidth=0.8)
    place = np.arange(len(layers))
    axes.bar(place, layers["coupling"], color=drawing.BLUE, width=0.7)
    mean = layers["coupling"].mean()
    axes.axhline(mean, color=drawing.ORANGE, linewidth=1.4, linestyle="--")
    axes.annotate(f"mean {mean:.2f}", (place[-1] + 0.7, mean), color=drawing.ORANGE, va="center", annotation_clip=False)
    axes.set(ylabel="ρ($I_X$, $I_T$)", ylim=(-1, 1), xlim=(-0.6, len(layers) - 0.4))
    _name_layers(axes, layers["layer"])
    return Picture(
        figure,
        "Spearman correlation of input capture and task information over the channels of each layer, from input (left) "
        "to output. Bars near zero: what a channel captures does not say whether the task needs it.",
    )


def _name_layers(axes: Axes, names: Sequence[str]) -> None:
    step = -(-len(names) // NAMED_LAYERS)
    places = np.arange(0, len(names), step)
    axes.set_xticks(places, [list(names)[place] for place in places], rotation=90, fontsize=7)
    axes.grid(axis="x", visible=False)


@register_section("groupings", "Groups on the two axes", place=130)
def draw_groupings(run: RunFolder) -> Picture:
    """Draws the adjusted Rand index of local and target groups against its permutation null."""
    layers = run.table("layers.parquet", ["layer", "rand_index", "null_mean", "null_95"])
    figure = new_figure(3.6)
    axes = figure.subplots()
    place = np.arange(len(layers))
    axes.bar(place, layers["null_95"] - layers["null_mean"], 0.8, layers["null_mean"], color=drawing.PALE)
    axes.scatter(place, layers["null_mean"], marker="_", s=60, color=drawing.GREY)
    beyond = layers["rand_index"] > layers["null_95"]
    for chosen, colour in ((beyond, drawing.VERMILLION), (~beyond, drawing.BLUE)):
        axes.scatter(place[chosen], layers["rand_index"][chosen], color=colour, s=26, zorder=3)
    defined = layers["rand_index"].notna().sum()
    axes.set(ylabel="adjusted Rand index", xlim=(-0.6, len(layers) - 0.4))
    axes.set_title(f"mean {layers['rand_index'].mean():.3f}; above the null in {int(beyond.sum())} of {defined} layers")
    _name_layers(axes, layers["layer"])
    return Picture(
        figure,
        "Channels grouped on (input capture, peer overlap) and on (task information, target excess): dots say how far "
        "the two groupings agree (1 is equal, 0 chance). Pale bars run from the mean to the 95th percentile of "
        "shuffled groups; red dots lie above.",
    )


@register_section("redundancy", "Pairwise redundancy", place=140)
def draw_redundancy(run: RunFolder) -> Picture:
    """Draws the pairwise redundancy of an early, a middle and a late layer, channels ordered by group."""
    pairs = run.table("analysis/graphs.table.parquet", ["layer", "channel", "peer", "redundancy"])
    groups = run.table("channels.parquet", ["layer", "channel"])
    column = next((name for name in ("local_group", "redundancy_community") if name in groups), None)
    if column is None:
        raise AbsentInput("channels.parquet with local_group")
    layers = list(dict.fromkeys(pairs["layer"]))
    figure = new_figure(3.6)
    row = figure.subplots(1, len(layers), squeeze=False)[0]
    for axes, layer in zip(row, layers, strict=True):
        matrix = pairs[pairs["layer"] == layer].pivot(index="channel", columns="peer", values="redundancy")
        group = groups[groups["layer"] == layer].set_index("channel")[column].loc[matrix.index]
        _draw_ordered(axes, matrix, group)
        axes.set_title(layer, fontsize=10)
    order = "group on the local axis" if column == "local_group" else "community of the redundancy graph"
    return Picture(
        figure,
        "What two channels share, -½·log(1-ρ²) in nats, darker is more (each layer on its own scale, up to its 98th "
        f"percentile). Channels are ordered by their {order} (lines); dark squares on the diagonal are groups that "
        "share among themselves.",
    )


def _draw_ordered(axes: Axes, matrix: pd.DataFrame, group: pd.Series) -> None:
    order = group.sort_values(kind="stable").index
    values = matrix.loc[order, order].to_numpy(dtype=float, copy=True)
    np.fill_diagonal(values, np.nan)
    finite = values[np.isfinite(values)]
    top = float(np.quantile(finite, 0.98)) if len(finite) else 1.0
    axes.imshow(values, cmap="Greys", vmin=0, vmax=max(top, 1e-9), interpolation="nearest")
    for edge in np.flatnonzero(np.diff(group.loc[order].to_numpy())) + 0.5:
        axes.axhline(edge, color=drawing.ORANGE, linewidth=0.9)
        axes.axvline(edge, color=drawing.ORANGE, linewidth=0.9)
    axes.set(xticks=[], yticks=[])


HIGHER_ORDER = (
    ("modularity", {"modularity_redundancy": ("$Q_R$", drawing.BLUE), "modularity_excess": ("$Q_S$", drawing.ORANGE)}),
    ("mean hull size (peers)", {"mean_hull_size": ("", drawing.BLUE)}),
    ("share of hulls", {"singleton_ratio": ("one", drawing.GREEN), "saturated_ratio": ("full", drawing.VERMILLION)}),
    ("triplet excess $S_3/S_2$", {"triplet_ratio": ("", drawing.BLUE)}),
)


@register_section("higher_order", "Graphs, hulls and triplets by depth", place=150)
def draw_higher_order(run: RunFolder) -> Picture:
    """Draws modularities, hull sizes, hull shares and the triplet ratio by depth."""
    layers = run.table("layers.parquet", ["layer", "depth"])
    panels = [(title, lines) for title, lines in HIGHER_ORDER if all(column in layers for column in lines)]
    if not panels:
        raise AbsentInput("layers.parquet with modularity_redundancy, mean_hull_size or triplet_ratio")
    figure = new_figure(2.7 * (-(-len(panels) // 2)))
    grid = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    depth = (layers["depth"] / max(1, layers["depth"].max())).to_numpy()
    for axes, (title, lines) in zip(grid, panels, strict=False):
        ends = []
        for column, (name, colour) in lines.items():
            axes.plot(depth, layers[column], color=colour, marker="o", markersize=3, linewidth=1.2)
            defined = layers[column].dropna()
            ends += [(1.0, float(defined.iloc[-1]), name, colour)] if len(defined) else []
        top = axes.get_ylim()[1]
        axes.set(title=title, xlabel="relative depth", ylim=(-0.04 * top, top))  # a line at 0 is seen beside the axis
        drawing.label_line_ends(axes, ends)
    return Picture(
        figure,
        "From input (0) to output (1). Modularity of the redundancy graph and of the target-excess graph; how many "
        "peers explain 95 % of what all peers explain, and the share of channels for which one does or for which ten "
        "do not (full); how much a third channel tells of the task beyond the best pair, relative to a second beyond "
        "the best single.",
    )


@register_section("propagation", "From layer to layer", place=160)
def draw_propagation(run: RunFolder) -> Picture:
    """Draws how routed source metrics rank the next layer's channels: mean matrix, and within against across axes."""
    table = run.table("analysis/propagation.table.parquet", ["source_metric", "destination_metric", "rank_correlation"])
    if not len(table):
        raise AbsentInput("a pair of consecutive layers in analysis/propagation.table.parquet")
    matrix = table.pivot_table(index="source_metric", columns="destination_metric", values="rank_correlation")
    matrix = matrix.reindex(index=list(ROUTED), columns=list(ROUTED))
    figure = new_figure(4.0)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    limit = max(0.1, float(np.nanmax(np.abs(matrix.to_numpy()))))
    _draw_heat(left, matrix, limit)
    for line in (left.axhline, left.axvline):
        line(1.5, color=drawing.INK, linewidth=1.5)
    left.set(xlabel="metric of the next layer", ylabel="metric routed by the weights")
    _draw_flows(right, table)
    pairs = table[["source", "destination"]].drop_duplicates()
    return Picture(
        figure,
        f"Spearman correlations over the channels of the next layer, of {len(pairs)} pairs of consecutive layers: a "
        "source metric averaged by weight norms against the destination's own metric. Left: mean over pairs, "
        "colours up to the largest value. Right: each pair by depth, local to local, target to target, and across.",
    )


def _draw_flows(axes: Axes, table: pd.DataFrame) -> None:
    local = {"input_capture", "peer_overlap"}
    source, destination = (table[name].isin(local) for name in ("source_metric", "destination_metric"))
    kinds = {"local": (source & destination, drawing.BLUE), "target": (~source & ~destination, drawing.ORANGE)}
    kinds["across"] = (source != destination, drawing.GREY)
    axes.axhline(0, color=drawing.GREY, linewidth=0.8)
    ends = []
    for name, (chosen, colour) in kinds.items():
        means = table[chosen].groupby(["source", "destination"], sort=False)["rank_correlation"].mean()
        axes.plot(np.arange(len(means)), means, color=colour, marker="o", markersize=3, linewidth=1.2)
        ends.append((len(means) - 1.0, float(means.iloc[-1]), name, colour))
    axes.set(xlabel="pair of layers, by depth", ylabel="mean ρ")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawing.label_line_ends(axes, [end for end in ends if np.isfinite(end[1])])
