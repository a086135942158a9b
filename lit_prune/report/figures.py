"""Figures of the course of a run: training, widths, cost and accuracy. Each function makes one picture of a run folder.

A function raises `AbsentInput` where the run lacks what it draws; the page then lists the section as not in this run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from lit_prune.report import drawing
from lit_prune.report.drawing import Picture, new_figure
from lit_prune.report.event_files import find_curve, steps_to_epochs
from lit_prune.report.run_folder import AbsentInput, RunFolder, stages_if_any
from lit_prune.report.sections import register_section
from lit_prune.report.tables import figure_of, is_number

CURVES = (("train", drawing.BLUE), ("val", drawing.ORANGE))


@register_section("training", "Training", place=50)
def draw_training(run: RunFolder) -> Picture:
    """Draws loss and accuracy over epochs, training and validation, with a line at every structural stage."""
    panels = [(name, curves) for name in ("loss", "accuracy") if (curves := _find_curves(run, name))]
    if not panels:
        raise AbsentInput("tensorboard/ scalars train/loss, val/loss, train/accuracy, val/accuracy")
    figure = new_figure(3.6)
    for axes, (name, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_curves(axes, name, curves, run)
    return Picture(
        figure,
        "Training (blue) and validation (orange). Dashed lines are structural stages: read how far the curves fall "
        "there and how many epochs they need to come back.",
    )


def _find_curves(run: RunFolder, name: str) -> dict[str, pd.DataFrame]:
    found = {split: find_curve(run.scalars, f"{split}/{name}") for split, _ in CURVES}
    return {split: curve for split, curve in found.items() if curve is not None}


def _draw_curves(axes: Axes, name: str, curves: Mapping[str, pd.DataFrame], run: RunFolder) -> None:
    scale, ends = (100.0 if name == "accuracy" else 1.0), []
    for split, colour in CURVES:
        if split not in curves:
            continue
        steps, values = curves[split]["step"].to_numpy(), scale * curves[split]["value"].to_numpy()
        epochs = steps_to_epochs(steps, run.scalars)
        x = steps if epochs is None else epochs
        axes.plot(x, values, color=colour, marker="o" if len(x) <= 40 else None, markersize=3)
        ends.append((x[-1], values[-1], split, colour))
    by_epoch = "epoch" in run.scalars
    axes.set(xlabel="epochs finished" if by_epoch else "step", ylabel="accuracy (%)" if scale > 1 else "loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if by_epoch:
        drawing.mark_stages(axes, stages_if_any(run))
    drawing.label_line_ends(axes, ends)


@register_section("widths", "Layer widths", place=40)
def draw_widths(run: RunFolder) -> Picture:
    """Draws each layer's width before the first stage and after the last one."""
    widths = collect_widths(run.stages)
    if not widths:
        raise AbsentInput("widths in stages.jsonl")
    figure = new_figure(1.0 + (0.24 if len(widths) <= 40 else 0.19) * len(widths))
    axes = figure.subplots()
    rows = np.arange(len(widths))
    before, after = np.array(list(widths.values()), dtype=float).T
    axes.barh(rows, before, height=0.72, color=drawing.PALE)
    axes.barh(rows, after, height=0.72, color=drawing.BLUE)
    for row, (dense, kept) in enumerate(widths.values()):
        gone = kept == 0
        text = "removed" if gone else (f"{dense}" if kept == dense else f"{dense} → {kept}")
        place: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
        axes.annotate(text, (dense, row), color=drawing.VERMILLION if gone else drawing.INK, **place)
    axes.set_yticks(rows, list(widths))
    axes.tick_params(axis="y", labelsize=9, length=0)
    axes.set(xlabel="output channels", ylim=(len(widths) - 0.4, -0.6), xlim=(0, before.max() * 1.1))
    axes.grid(axis="y", visible=False)
    return Picture(
        figure,
        "Output channels of every convolution and linear layer in forward order: pale before the first stage, blue "
        "after the last one. “removed” is a layer that went with its block.",
    )


def collect_widths(stages: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Returns layer -> (width before the first stage that lists it, width after the last stage that lists it)."""
    widths: dict[str, tuple[int, int]] = {}
    for stage in stages:
        for layer, width in (stage.get("widths") or {}).items():
            first = widths[layer][0] if layer in widths else width["before"]
            widths[layer] = (int(first), int(width["after"]))
    return widths


@register_section("path", "Cost and accuracy", place=20)
def draw_path(run: RunFolder) -> Picture:
    """Draws accuracy (or the monitor) against MACs: dense, then cut, recalibrated and repaired at every stage."""
    stages = [stage for stage in run.stages if is_number((stage.get("macs") or {}).get("after"))]
    points = [_path_points(stage, first=position == 0) for position, stage in enumerate(stages)]
    if not any(len(path) > 1 for path in points):
        raise AbsentInput("accuracy and MACs in stages.jsonl")
    figure = new_figure(4.4)
    axes = figure.subplots()
    for path in points:
        _draw_path_arrows(axes, path)
    for previous, path in zip(points, points[1:], strict=False):
        if previous and path:
            ends = [previous[-1][1:], path[0][1:]]
            axes.plot(*zip(*ends, strict=True), color=drawing.GREY, linestyle=":", linewidth=1.2, zorder=1)
    axes.margins(x=0.12, y=0.16)
    axes.autoscale_view()
    _label_path(axes, points, [str(stage.get("name", "?")) for stage in stages])
    name = figure_of(stages[0]).title
    axes.set(xlabel="multiply-adds for one image", ylabel=f"{name} (%)" if "acc" in name else name)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    _path_legend(axes)
    return Picture(
        figure,
        "Cost and accuracy through the run, from the dense network at the right to the compact one at the left. The "
        "slanted arrow is the cut itself, the vertical ones are new BatchNorm statistics and then training; dotted "
        "is training between two stages. Bare numbers count the stages in the order of their table.",
    )


PATH_MARKS = {
    "start": ("o", drawing.GREY, drawing.GREY, "before the stage"),
    "after_surgery": ("X", drawing.VERMILLION, drawing.VERMILLION, "after surgery"),
    "after_recalibration": ("o", "white", drawing.BLUE, "recalibrated"),
    "after_repair": ("o", drawing.BLUE, drawing.BLUE, "repaired"),
}


def _path_points(stage: Mapping[str, Any], first: bool) -> list[tuple[str, float, float]]:
    """Returns the measured points of a stage as (kind, MACs, figure); accuracies in percent."""
    name = figure_of(stage).key
    figures, macs, unit = stage.get(name) or {}, stage["macs"], 100 if "acc" in name else 1
    start = figures.get("before")
    if first and not is_number(start):
        start = figures.get("dense")
    values = {"start": start, **{kind: figures.get(kind) for kind in list(PATH_MARKS)[1:]}}
    cost = {kind: macs["after"] for kind in PATH_MARKS} | {"start": macs.get("before", macs["after"])}
    return [(kind, float(cost[kind]), unit * value) for kind, value in values.items() if is_number(value)]


def _draw_path_arrows(axes: Axes, path: Sequence[tuple[str, float, float]]) -> None:
    for (_, *begin), (kind, x, y) in zip(path, path[1:], strict=False):
        colour = drawing.VERMILLION if kind == "after_surgery" else drawing.BLUE
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.4, "shrinkA": 5, "shrinkB": 5}
        axes.annotate("", (x, y), (begin[0], begin[1]), arrowprops=arrow)
    for kind, x, y in path:
        marker, face, edge, _ = PATH_MARKS[kind]
        axes.plot([x], [y], marker, color=face, markeredgecolor=edge, markeredgewidth=1.4, markersize=8, zorder=3)


def _label_path(axes: Axes, points: Sequence[Sequence[tuple[str, float, float]]], names: Sequence[str]) -> None:
    """Writes names and values; past three stages only the stages' numbers (the stages table has the rest)."""
    few = len(points) <= 3
    for position, (path, name) in enumerate(zip(points, names, strict=True)):
        if path and path[0][0] == "start" and (few or position == 0):
            _write(axes, path[0], f"{'' if position else 'dense '}{path[0][2]:.1f}", (0, 9), "center")
        for point in path:
            if point[0] == "after_surgery":
                _write(axes, point, f"{name}: {point[2]:.1f}" if few else str(position + 1), (0, -17), "center")
        if few:
            _label_raised(axes, [point for point in path if point[0] in ("after_recalibration", "after_repair")])


def _label_raised(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    heights = drawing.spread_apart([y for _, _, y in points], 0.055 * float(np.ptp(axes.get_ylim())))
    for (kind, x, y), height in zip(points, heights, strict=True):
        _write(axes, (kind, x, height), f"{y:.1f}", (9, -4), "left")


def _write(axes: Axes, point: tuple[str, float, float], text: str, offset: tuple[int, int], align: str) -> None:
    axes.annotate(text, point[1:], xytext=offset, textcoords="offset points", ha=align, fontsize=9)


def _path_legend(axes: Axes) -> None:
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=face, markeredgecolor=edge, markersize=8, label=text)
        for marker, face, edge, text in PATH_MARKS.values()
    ]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=4, handletextpad=0.3)
