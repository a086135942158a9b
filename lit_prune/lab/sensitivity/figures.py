"""The sensitivity figure: loss of the figure by group and width."""

import numpy as np

from lit_prune.report import drawing
from lit_prune.report.drawing import Picture, new_figure
from lit_prune.report.run_folder import RunFolder
from lit_prune.report.sections import register_section

COLUMNS = ("group", "keep", "loss", "depth")


@register_section("sensitivity", "Sensitivity of the layers", place=165)
def draw_sensitivity(run: RunFolder) -> Picture:
    """Draws the loss of the figure with one group cut, a line a width."""
    table = run.table("sensitivity.parquet", COLUMNS)
    order = table.drop_duplicates("group").sort_values("depth")["group"].tolist()
    places = {name: place for place, name in enumerate(order)}
    figure = new_figure(4.2)
    axes = figure.subplots()
    colours = (drawing.BLUE, drawing.ORANGE, drawing.VERMILLION, drawing.GREEN)
    for number, (share, rows) in enumerate(sorted(table.groupby("keep"), reverse=True)):
        x, colour = rows["group"].map(places), colours[number % len(colours)]
        axes.plot(x, rows["loss"], "o:", color=colour, markersize=3, linewidth=1, alpha=0.7)
        column = "loss_refit" if "loss_refit" in rows else "loss"
        axes.plot(x, rows[column], "o-", color=colour, markersize=4, label=f"{share:.0%} of the units kept")
    axes.axhline(0, color=drawing.GREY, linewidth=0.8)
    axes.set_xticks(np.arange(len(order)), order, rotation=60, ha="right", fontsize=8)
    axes.set(ylabel="loss of the figure")
    axes.legend(fontsize=9)
    return Picture(
        figure,
        "One group of channels at a time, every other whole, nothing trained: dotted right after the cut, full with "
        "the readers solved again. Groups near zero at a small width are where the network has slack.",
    )
