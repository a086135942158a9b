"""The curve: accuracy against the seconds that the network took."""

from lit_prune.report import drawing
from lit_prune.report.drawing import Picture, new_figure
from lit_prune.report.run_folder import RunFolder
from lit_prune.report.sections import register_section

COLUMNS = ("keep", "repair", "seconds", "macs_ratio", "figure", "dense")
COLOURS = (drawing.BLUE, drawing.ORANGE, drawing.GREEN, drawing.VERMILLION)


@register_section("curve", "What the seconds buy", place=25)
def draw_curve(run: RunFolder) -> Picture:
    """Draws the figure against all seconds of compression and repair, a line a budget, and the dense network's."""
    table = run.table("curve.parquet", COLUMNS)
    figure = new_figure(4.2)
    axes = figure.subplots()
    for number, (keep, rows) in enumerate(sorted(table.groupby("keep"), reverse=True)):
        rows = rows.sort_values("seconds")
        label = f"{keep:.0%} asked for, {rows['macs_ratio'].iloc[0]:.0%} of the MACs"
        axes.plot(rows["seconds"], rows["figure"], "o-", color=COLOURS[number % len(COLOURS)], label=label)
    axes.axhline(table["dense"].iloc[0], color=drawing.GREY, linewidth=0.8, linestyle="--", label="dense")
    axes.set(xlabel="seconds of compression and repair", ylabel="accuracy", xlim=(0, None))
    axes.legend(fontsize=9)
    return Picture(
        figure,
        "Each line begins with the network right after the cut, its layers solved again and nothing trained; further "
        "points are repairs towards the dense network's prediction, each from there on. Every point's network lies in "
        "a folder of its own below curve/.",
    )
