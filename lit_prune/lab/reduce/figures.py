"""Figures and tables of `reduce`: the certificate against measured agreement, methods over widths, rescaling."""

from dataclasses import dataclass, replace
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from lit_prune.errors import InputError
from lit_prune.report import drawing
from lit_prune.report.drawing import Picture, new_figure
from lit_prune.report.run_folder import AbsentInput, RunFolder
from lit_prune.report.sections import register_section
from lit_prune.report.tables import Entry, Table, format_percent

COLOURS = (drawing.BLUE, drawing.ORANGE, drawing.GREEN, drawing.VERMILLION, "#CC79A7", "#56B4E9", drawing.INK)
WIDE_LABEL = 26  # characters; of longer ones two fit side by side, else three
PANELS = (("accuracy", "accuracy"), ("iia", "interchange accuracy (IIA)"), ("kl", "KL, nats"))


@dataclass(frozen=True)
class Request:
    """One request of the run: which layer of how many units, and its summary.

    Attributes:
        layer: where units were replaced.
        units: how many it has.
        summary: rows at the largest calibration size or, by calibration size, at the smallest width.
        stress: rows of the rescaling.
        by: what the rows differ in, `width` or `calibration_size`.
    """

    layer: str
    units: int
    summary: pd.DataFrame
    stress: pd.DataFrame
    by: str = "width"

    @property
    def methods(self) -> list[str]:
        """Labels in order."""
        return list(dict.fromkeys(self.summary["method"]))

    @property
    def legend_columns(self) -> int:
        """Labels side by side."""
        return 2 if max(map(len, self.methods)) > WIDE_LABEL else 3

    def of(self, method: str) -> pd.DataFrame:
        """A method's rows in order."""
        return self.summary[self.summary["method"] == method].sort_values(self.by)

    def places(self, rows: pd.DataFrame) -> pd.Series:
        """Where rows lie on the horizontal axis."""
        return rows["width"] / self.units if self.by == "width" else rows["calibration_size"]

    @property
    def axis(self) -> str:
        """What the horizontal axis shows."""
        if self.by == "width":
            return "share of units kept"
        return f"calibration images, {self.summary['width'].iloc[0] / self.units:.0%} kept"


@register_section("certificate", "Certificate against measured agreement", place=240)
def draw_certificate(run: RunFolder) -> Picture:
    """Draws IIA and its two certified lower bounds over the share of units kept, for the first methods.

    Of several requests the one with the most widths is shown.
    """
    request = max(_requests(run), key=lambda one: one.summary["width"].nunique())
    names = request.methods[:3]
    figure = new_figure(3.4)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        rows = request.of(name)
        lines = (("iia", "measured", drawing.INK, "-"), ("empirical", "certified, empirical tail", drawing.BLUE, "-"))
        for column, label, colour, style in (*lines, ("bound", "certified, Markov", drawing.VERMILLION, "--")):
            spread = rows[f"{column}_sd"]
            look = {"color": colour, "linestyle": style, "marker": "o", "ms": 4, "label": label}
            axes.errorbar(request.places(rows), rows[column], spread, **look)
        axes.set_title(fill(name, 28))
        axes.set_xlabel("share of units kept")
        axes.set_ylim(-0.03, 1.03)
    panels[0].set_ylabel("interchange accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    _expect_certified(run)
    return Picture(
        figure,
        "Share of interchange interventions on which reduced and original network agree, and what margins and logit "
        "distortion alone guarantee of it (best ε of each). The bounds are never above the measured line. Means over "
        "seeds, bars one standard deviation.",
    )


def _expect_certified(run: RunFolder) -> None:
    for key in (key for request in run.reduction["requests"] for key in request["keys"]):
        cell = run.reduction["results"][key]
        certificate = cell["certificate"]
        if not certificate["bound"] <= certificate["empirical"] <= cell["iia"] + 1e-12:
            raise InputError(f"reduction.json: cell {key} has a certificate above its IIA; reduce again")


@register_section("reduction", "Mechanisms replaced", place=230)
def draw_reduction(run: RunFolder) -> Picture:
    """Draws accuracy, IIA and KL over the share of units kept and over the calibration images, one line a method."""
    requests = [view for tables in run.reduction["requests"] for view in _views(tables)]
    if not requests:
        raise AbsentInput("reduction.json with a finished request")
    heights = [2.7 + 0.22 * -(-len(request.methods) // request.legend_columns) for request in requests]
    figure = new_figure(sum(heights))
    parts = figure.subfigures(len(requests), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, request in zip(parts, requests, strict=True):
        _draw_request(part, request)
    layers = ", ".join(dict.fromkeys(request.layer for request in requests))
    return Picture(
        figure,
        f"Units of {layers} replaced, nothing trained: accuracy, agreement with the original under interchange "
        "interventions, and divergence from it, by method. One row of panels for each request, and one more where it "
        "asked for several numbers of calibration images. Means over seeds.",
    )


def _draw_request(part: SubFigure, request: Request) -> None:
    panels = part.subplots(1, len(PANELS))
    for axes, (column, title) in zip(panels, PANELS, strict=True):
        for place, name in enumerate(request.methods):
            rows = request.of(name)
            look = {"color": COLOURS[place % len(COLOURS)], "linestyle": "-" if place < len(COLOURS) else "--"}
            axes.plot(request.places(rows), rows[column], marker="o", ms=4, label=name, **look)
        axes.set_title(title)
        axes.set_xlabel(request.axis)
        if request.by == "calibration_size":
            axes.set_xscale("log")
    _cap(panels[2], request.summary["kl"])
    handles, names = panels[0].get_legend_handles_labels()
    part.legend(handles, names, loc="outside lower center", ncols=request.legend_columns, fontsize=9)


def _cap(axes: Axes, values: pd.Series) -> None:
    """Keeps a method that fails from flattening the rest: a logarithmic axis where values span far."""
    positive = values[values > 0]
    if len(positive) and positive.max() > 20 * positive.median():
        axes.set_yscale("log")


@register_section("rescaling", "Kept units under rescaling", place=250)
def draw_rescaling(run: RunFolder) -> Picture:
    """Draws the kept-set Jaccard of each score for both ranges of the rescaling, one panel a request that has it."""
    tables = [request.stress for request in _requests(run) if len(request.stress)]
    if not tables:
        raise AbsentInput("reduction.json with the extra 'stress'")
    figure = new_figure(2.8 * len(tables))
    for axes, rows in zip(figure.subplots(len(tables), 1, squeeze=False)[:, 0], tables, strict=True):
        _draw_jaccards(axes, rows)
    return Picture(
        figure,
        "Units are multiplied by random factors and divided by them where they are read: the function is the same. A "
        "score that measures the function keeps the same half (1); two random halves share a third (dotted).",
    )


def _draw_jaccards(axes: Axes, rows: pd.DataFrame) -> None:
    names = list(dict.fromkeys(rows["score"]))
    ranges = list(rows.groupby(["low", "high"], sort=False))
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
    axes.legend(title="scalings", loc="center left", bbox_to_anchor=(1, 0.5))


@register_section("reduction_table", "Reductions", place=260)
def tabulate_reduction(run: RunFolder) -> Table:
    """Returns one row a request, method and width: accuracy, IIA, KL, certificate, seconds of the stages."""
    titles = ("layer", "kept", "method", "accuracy", "IIA", "KL, nats", "certified", "score, s", "compile, s")
    rows = tuple(
        (Entry(request.layer), *_cells(row)) for request in _requests(run) for row in request.summary.to_dict("records")
    )
    caption = "Means over seeds; in small type one standard deviation. Certified: Markov, then the empirical tail."
    return Table((*titles, "verify, s"), rows, caption, text_columns=3)


def _cells(row: dict[str, Any]) -> tuple[Entry, ...]:
    def spread(name: str, digits: int) -> Entry:
        return Entry(f"{row[name]:.{digits}f}", f"± {row[f'{name}_sd']:.{digits}f}" if row["seeds"] > 1 else "")

    accuracy = Entry(format_percent(row["accuracy"]), f"± {100 * row['accuracy_sd']:.2f}" if row["seeds"] > 1 else "")
    stages = (Entry(f"{row[f'seconds_{stage}']:.2g}") for stage in ("score", "compile", "verify"))
    certified = Entry(f"{row['bound']:.3f}, {row['empirical']:.3f}")
    return (
        Entry(str(row["width"])),
        Entry(row["method"]),
        accuracy,
        spread("iia", 3),
        spread("kl", 3),
        certified,
        *stages,
    )


def _requests(run: RunFolder) -> list[Request]:
    found = [_by_width(tables) for tables in run.reduction["requests"]]
    if not found:
        raise AbsentInput("reduction.json with a finished request")
    return found


def _by_width(tables: dict[str, Any]) -> Request:
    rows = pd.DataFrame(tables["summary"])
    largest = rows[rows["calibration_size"] == rows["calibration_size"].max()]
    return Request(tables["layer"], tables["units"], largest, pd.DataFrame(tables["stress"]))


def _views(tables: dict[str, Any]) -> list[Request]:
    """The request over its widths, unless it has one alone, and over its calibration sizes, if it has several."""
    rows, request = pd.DataFrame(tables["summary"]), _by_width(tables)
    if rows["calibration_size"].nunique() < 2:
        return [request]
    narrow = replace(request, summary=rows[rows["width"] == rows["width"].min()], by="calibration_size")
    return [request, narrow] if rows["width"].nunique() > 1 else [narrow]
