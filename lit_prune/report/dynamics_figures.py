"""Figures of training: how channels move on the two axes, and which way the layers are pushed."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lit_prune.report import drawing
from lit_prune.report.drawing import Picture, new_figure
from lit_prune.report.run_folder import AbsentInput, RunFolder, stages_if_any
from lit_prune.report.sections import register_section

COSINES = {
    f"task direction: {title}": {
        f"capture_{name}": (rf"$\nabla I_X$, $\nabla {symbol}$", drawing.BLUE),
        "update_capture": (r"$-\nabla L$, $\nabla I_X$", drawing.GREEN),
        f"update_{name}": (rf"$-\nabla L$, $\nabla {symbol}$", drawing.ORANGE),
    }
    for name, title, symbol in (("task", "of the information", "I_T"), ("correlation", "of the correlation", r"\rho"))
}
DYNAMICS = {
    "coupling": ("ρ($I_X$, $I_T$)", {"coupling": ("coupling", drawing.BLUE)}),
    "velocity": ("ρ(Δ$I_X$, Δ$I_T$)", {"velocity": ("velocity", drawing.VERMILLION)}),
    "persistence": (
        "ρ(rank now, rank at the end)",
        {"persistence_capture": ("$I_X$", drawing.BLUE), "persistence_task": ("$I_T$", drawing.ORANGE)},
    ),
}


@register_section("dynamics", "Motion on the two axes", place=80)
def draw_dynamics(run: RunFolder) -> Picture:
    """Draws coupling, velocity and rank persistence over epochs, means over layers with quartile bands."""
    columns = [column for _, lines in DYNAMICS.values() for column in lines]
    table = run.table("trace/dynamics.parquet", ["epoch", *columns])
    if table["epoch"].nunique() < 2:
        raise AbsentInput("trace/dynamics.parquet with two epochs")
    figure = new_figure(3.4)
    for axes, (title, lines) in zip(figure.subplots(1, 3), DYNAMICS.values(), strict=True):
        _draw_bands(axes, table, lines, named=len(lines) > 1)
        axes.set(title=title, xlabel="epochs finished")
        drawing.mark_stages(axes, stages_if_any(run), named=False)
    return Picture(
        figure,
        "Mean over layers, band from the first to the third quartile. Left: do channels that capture much also tell "
        "much of the task. Middle: do channels that gained on one axis since the epoch traced before also gain on the "
        "other. Right: how far the ranking of channels is already the final one; the axis that settles first is the "
        "one learned first. Ranks across a removal of channels are not compared.",
    )


@register_section("gradients", "Directions of change", place=90)
def draw_gradients(run: RunFolder) -> Picture:
    """Draws the cosines between information gradients and descent over epochs, one panel a task direction."""
    columns = dict.fromkeys(column for lines in COSINES.values() for column in lines)
    table = run.table("trace/gradients.parquet", ["epoch", *columns])
    figure = new_figure(3.4)
    for axes, (title, lines) in zip(figure.subplots(1, 2, sharey=True), COSINES.items(), strict=True):
        _draw_bands(axes, table, lines, named=True)
        axes.set(title=title, xlabel="epochs finished", ylabel="cosine, mean over channels")
        drawing.mark_stages(axes, stages_if_any(run))
    return Picture(
        figure,
        "Cosines in the space of a channel's weights, mean over channels and layers, band from the first to the third "
        "quartile of the layers. Near zero: raising one quantity leaves the other as it is, and descent on the loss "
        "serves neither directly. The information does not know whether T rises or falls with a channel; the "
        "correlation does, and its direction turns round where T falls.",
    )


def _draw_bands(axes: Axes, table: pd.DataFrame, lines: Mapping[str, tuple[str, str]], named: bool) -> None:
    """One line a column, the mean over layers, with its quartile band."""
    ends = []
    axes.axhline(0, color=drawing.GREY, linewidth=0.8)
    for column, (name, colour) in lines.items():
        groups = table.dropna(subset=[column]).groupby("epoch")[column]
        mean = groups.mean()
        if not len(mean):
            continue
        epochs = mean.index.to_numpy()
        axes.fill_between(epochs, groups.quantile(0.25), groups.quantile(0.75), color=colour, alpha=0.15, lw=0)
        axes.plot(epochs, mean.to_numpy(), color=colour, marker="o" if len(epochs) <= 40 else None, markersize=3)
        ends.append((float(epochs[-1]), float(mean.iloc[-1]), name, colour))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.05), max(high, np.nextafter(0.05, 1)))
    if named:
        drawing.label_line_ends(axes, ends)
