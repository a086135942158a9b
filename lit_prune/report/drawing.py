"""How the report's figures look: sizes, colours, labels, PNG bytes."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every common form of colour blindness.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
INK, GREY, PALE, GRID = "#262626", "#737373", "#D9DDE1", "#ECEEF0"
HALO = "#FFFFFE"  # around dots: what sets the dark ones off on a dark page
# On coloured cells: not the colours that a dark page exchanges.
ON_DARK, ON_LIGHT = "#FEFEFE", "#1F1F1F"
WIDTH_INCHES = 9.6
# Without the yellow end of viridis, which is hard to see on white.
OVERLAP_COLOURS = LinearSegmentedColormap.from_list(
    "overlap", matplotlib.colormaps["viridis_r"](np.linspace(0.15, 1, 64))
)

STYLE: Mapping[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "normal",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Picture:
    """A figure of the page, the caption that says what to read from it, and what its slider over epochs shows.

    Attributes:
        figure: as it is drawn.
        caption: what to read from it.
        frames: `titles` of the epochs, `layers` with a frame each epoch, `colours`, `overlap` (see `epoch_frames`).
    """

    figure: Figure
    caption: str
    frames: Mapping[str, Any] | None = None


def new_figure(height_inches: float) -> Figure:
    """Returns an empty figure of the page's width, outside pyplot's global state."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def styled() -> Any:
    """Returns a context in which new figures take the report's style."""
    return matplotlib.rc_context(cast(Any, dict(STYLE)))


def render_png(figure: Figure, dots_per_inch: int = 160) -> bytes:
    """Returns the figure as PNG; no date in it, so that equal figures are equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch, metadata={"Software": None})
    return buffer.getvalue()


def spread_apart(positions: Sequence[float], gap: float) -> np.ndarray:
    """Returns the positions moved as little as a single upward and a single downward pass need to leave `gap` between.

    Args:
        positions: places of labels on one axis, any order, [n].
        gap: smallest distance allowed between two of them.

    Returns:
        float [n], in the same order; the mean is kept.
    """
    places = np.asarray(positions, dtype=float)
    order = np.argsort(places, kind="stable")
    moved = places[order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    moved += places.mean() - moved.mean() if len(moved) else 0.0
    result = np.empty_like(moved)
    result[order] = moved
    return result


def label_line_ends(axes: Axes, ends: Iterable[tuple[float, float, str, str]]) -> None:
    """Writes each line's name at its end, in its colour, labels kept apart."""
    ends = list(ends)
    low, high = axes.get_ylim()
    heights = spread_apart([y for _, y, _, _ in ends], 0.075 * (high - low))
    for (x, _, text, colour), height in zip(ends, heights, strict=True):
        place: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(text, (x, height), color=colour, va="center", fontsize=10, **place)


def mark_stages(
    axes: Axes, stages: Iterable[Mapping[str, Any]], place: Callable[[float], float] = float, named: bool = True
) -> None:
    """Draws a dashed vertical line at every structural stage, with the stage's name above the axes.

    Stages of one epoch share a line; a name close to the one before it is written higher.

    Args:
        axes: axes whose limits in x are already final.
        stages: records of stages.jsonl.
        place: position on the x axis of a number of finished epochs.
        named: whether to write the names.
    """
    names: dict[float, list[str]] = {}
    for stage in stages:
        if stage.get("epoch") is not None:
            names.setdefault(place(float(stage["epoch"])), []).append(str(stage.get("name", "?")))
    near, level, previous = 0.13 * float(np.ptp(axes.get_xlim())), 0, -np.inf
    for x, together in sorted(names.items()):
        level = level + 1 if x - previous < near else 0
        previous = x
        axes.axvline(x, color=VERMILLION, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
        if named:
            where: dict[str, Any] = {
                "xycoords": axes.get_xaxis_transform(),
                "xytext": (0, 3 + 11 * level),
                "textcoords": "offset points",
            }
            look: dict[str, Any] = {"ha": "center", "color": VERMILLION, "fontsize": 9, "annotation_clip": False}
            axes.annotate(" + ".join(together), (x, 1), **where, **look)
