"""Figures and tables of `reduce`: the certificate against measured agreement, methods over widths, rescaling."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lit_prune.errors import InputError
from lit_prune.report import drawing
from lit_prune.report.drawing import Picture, new_figure
from lit_prune.report.run_folder import AbsentInput, RunFolder
from lit_prune.report.tables import Cell, Table, format_percent

COLOURS = (drawing.BLUE, drawing.ORANGE, drawing.GREEN, drawing.VERMILLION, "#CC79A7", "#56B4E9", drawing.INK)
PANELS = (("accuracy", "accuracy"), ("iia", "interchange accuracy (IIA)"), ("kl", "KL, nats"))


def draw_certificate(run: RunFolder) -> Picture:
    """Draws IIA and its two certified lower bounds over the share of units kept, for the first methods."""
    summary, units = _summary(run)
    names = list(dict.fromkeys(summary["method"]))[:3]
    figure = new_figure(3.2)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        rows = summary[summary["method"] == name].sort_values("width")
        share = rows["width"] / units
        lines = (("iia", "measured", drawing.INK, "-"), ("empirical", "certified, empirical tail", drawing.BLUE, "-"))
        for column, label, colour, style in (*lines, ("bound", "certified, Markov", drawing.VERMILLION, "--")):
            axes.errorbar(
                share, rows[column], rows[f"{column}_sd"], color=colour, linestyle=style, marker="o", ms=4, label=label
            )
        axes.set_title(name)
        axes.set_xlabel("share of units kept")
        axes.set_ylim(-0.03, 1.03)
    panels[0].set_ylabel("interchange accuracy")
    panels[0].legend(loc="upper left", fontsize=9)
    _expect_certified(run)
    return Picture(
        figure,
        "Share of interchange interventions on which reduced and original network agree, and what margins and logit "
        "distortion alone guarantee of it (best ε of each). The bounds are never above the measured line. Means over "
        "seeds, bars one standard deviation.",
    )


def _expect_certified(run: RunFolder) -> None:
    for key in run.reduction["cells"]:
        cell = run.reduction["results"][key]
        certificate = cell["certificate"]
        if not certificate["bound"] <= certificate["empirical"] <= cell["iia"] + 1e-12:
            raise InputError(f"reduction.json: cell {key} has a certificate above its IIA; reduce again")


def draw_reduction(run: RunFolder) -> Picture:
    """Draws accuracy, IIA and KL over the share of units kept, one line a method."""
    summary, units = _summary(run)
    names = list(dict.fromkeys(summary["method"]))
    figure = new_figure(3.4)
    panels = figure.subplots(1, len(PANELS))
    for axes, (column, title) in zip(panels, PANELS, strict=True):
        for place, name in enumerate(names):
            rows = summary[summary["method"] == name].sort_values("width")
            colour = COLOURS[place % len(COLOURS)]
            style = "-" if place < len(COLOURS) else "--"
            axes.plot(rows["width"] / units, rows[column], color=colour, linestyle=style, marker="o", ms=4, label=name)
        axes.set_title(title)
        axes.set_xlabel("share of units kept")
    _cap(panels[2], summary["kl"])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return Picture(
        figure,
        f"Units of {run.reduction['layer']} replaced, nothing trained: accuracy, agreement with the original under "
        "interchange interventions, and divergence from it, by method. Means over seeds.",
    )


def _cap(axes: Axes, values: pd.Series) -> None:
    """Keeps a method that fails from flattening the rest: a logarithmic axis where values span far."""
    positive = values[values > 0]
    if len(positive) and positive.max() > 20 * positive.median():
        axes.set_yscale("log")


def draw_rescaling(run: RunFolder) -> Picture:
    """Draws the kept-set Jaccard of each score for both ranges of the rescaling."""
    rows = pd.DataFrame(run.reduction.get("stress") or [])
    if rows.empty:
        raise AbsentInput("reduction.json with the extra 'stress'")
    names = list(dict.fromkeys(rows["score"]))
    ranges = list(rows.groupby(["low", "high"], sort=False))
    figure = new_figure(2.8)
    axes = figure.subplots()
    places, width = np.arange(len(names)), 0.8 / len(ranges)
    for index, ((low, high), part) in enumerate(ranges):
        values = part.groupby("score")["jaccard"].agg(["mean", "std"]).loc[names]
        where = places + (index - (len(ranges) - 1) / 2) * width
        colour = (drawing.BLUE, drawing.ORANGE)[index % 2]
        axes.bar(where, values["mean"], 0.9 * width, yerr=values["std"], color=colour, label=f"{low:g} to {high:g}")
    axes.axhline(1 / 3, color=drawing.GREY, linestyle=":", linewidth=1)
    axes.set_xticks(places, names)
    axes.set_ylabel("Jaccard of kept halves")
    axes.set_ylim(0, 1.05)
    axes.grid(visible=False, axis="x")
    axes.legend(title="scalings")
    return Picture(
        figure,
        "Units are multiplied by random factors and divided by them where they are read: the function is the same. A "
        "score that measures the function keeps the same half (1); two random halves share a third (dotted).",
    )


def tabulate_reduction(run: RunFolder) -> Table:
    """Returns one row a method and width: accuracy, IIA, KL, certificate, seconds of the stages."""
    summary, _ = _summary(run)
    titles = ("kept", "method", "accuracy", "IIA", "KL, nats", "certified", "score, s", "compile, s", "verify, s")
    rows = tuple(_cells(row) for row in summary.to_dict("records"))
    caption = "Means over seeds; in small type one standard deviation. Certified: Markov, then the empirical tail."
    return Table(titles, rows, caption, text_columns=2)


def _cells(row: dict[str, Any]) -> tuple[Cell, ...]:
    def spread(name: str, digits: int) -> Cell:
        return Cell(f"{row[name]:.{digits}f}", f"± {row[f'{name}_sd']:.{digits}f}" if row["seeds"] > 1 else "")

    accuracy = Cell(format_percent(row["accuracy"]), f"± {100 * row['accuracy_sd']:.2f}" if row["seeds"] > 1 else "")
    stages = (Cell(f"{row[f'seconds_{stage}']:.2g}") for stage in ("score", "compile", "verify"))
    certified = Cell(f"{row['bound']:.3f}, {row['empirical']:.3f}")
    return (
        Cell(str(row["width"])),
        Cell(row["method"]),
        accuracy,
        spread("iia", 3),
        spread("kl", 3),
        certified,
        *stages,
    )


def _summary(run: RunFolder) -> tuple[pd.DataFrame, int]:
    """The summary of the largest calibration size, and the number of units."""
    rows = pd.DataFrame(run.reduction.get("summary") or [])
    if rows.empty:
        raise AbsentInput("reduction.json with finished cells")
    return rows[rows["calibration_size"] == rows["calibration_size"].max()], run.reduction["units"]
