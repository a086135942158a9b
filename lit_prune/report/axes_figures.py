"""Figures of the channels on the two axes: the plane, and the coupling of the axes over epochs."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, to_hex
from matplotlib.patches import Rectangle

from lit_prune.measurement.summaries import coupling
from lit_prune.report import drawing
from lit_prune.report.drawing import Picture, new_figure
from lit_prune.report.run_folder import AbsentInput, RunFolder, layer_order, stages_if_any
from lit_prune.report.sections import register_section

MOST_CHANNELS = 25_000
"""Channels × epochs that the page holds, about 30 characters each; beyond, epochs are left out, then layers."""
SHORTEST = 5  # epochs that are always kept
AXES = ("input_capture", "task_information", "peer_overlap")


@register_section("plane", "The two axes", place=60)
def draw_plane(run: RunFolder) -> Picture:
    """Draws channels of an early, a middle and a late layer on the two axes, first against last traced epoch."""
    table, epochs = _plane_table(run)
    live = table.dropna(subset=["input_capture", "task_information"])
    present = [set(live.loc[live["epoch"] == epoch, "layer"]) for epoch in epochs]
    layers = _thirds([layer for layer in layer_order(live) if all(layer in names for names in present)])
    if not layers:
        raise AbsentInput("a layer with live channels at the first and the last traced epoch")
    figure = new_figure(0.7 + 2.5 * len(layers))
    widths = table.groupby(["layer", "epoch"])["channel"].transform("size")
    titles = {epoch: _epoch_title(epoch) for epoch in sorted(table["epoch"].unique())}
    overlap = live.loc[live["layer"].isin(layers), "peer_overlap"].dropna()
    most = max(float(overlap.quantile(0.98)) if len(overlap) else 0.0, 1e-9)
    norm, frames = Normalize(0.0, most), None
    if len(titles) > 1:
        frames = epoch_frames(live.assign(width=widths), titles, layer_order(live), layers, most)
    grid = figure.subplots(len(layers), len(epochs), sharex="row", sharey="row", squeeze=False)
    for row, layer in zip(grid, layers, strict=True):
        of_layer = live[live["layer"] == layer]
        panels = [of_layer[of_layer["epoch"] == epoch].set_index("channel") for epoch in epochs]
        for axes, epoch, panel in zip(row, epochs, panels, strict=True):
            title = "" if epoch is None or epoch != epoch else f", {_epoch_title(epoch)}"
            scatter = _draw_channels(axes, panel, norm)
            axes.set_title(f"{layer}{title}: {len(panel)} channels", fontsize=10, loc="left")
        row[0].set_ylabel("task information $I_T$ (nats)")
        _draw_movement(row, panels)
    for axes in grid[-1]:
        axes.set_xlabel("input capture $I_X$ (nats)")
    figure.colorbar(scatter, ax=grid, label=r"peer overlap $\bar R_X$ (nats)", aspect=40, extend="max")
    return Picture(
        figure,
        "One dot a channel: how much of its input it captures (x), how much its pooled output tells of the task (y), "
        "how much its peers repeat it (colour). Axes are shared within a row, so compare left with right; thin lines "
        "lead from each channel's place in the first epoch (absent where channels were removed between).",
        frames,
    )


def plane_pixels(channels: pd.DataFrame, epoch: int) -> np.ndarray | None:
    """Picture of an early, a middle and a late layer on the two axes, uint8 [H, W, 3]; None without live channels."""
    live = channels.dropna(subset=["input_capture", "task_information"])
    layers = _thirds(layer_order(live))
    if not layers:
        return None
    with drawing.styled():
        figure = new_figure(3.2)
        row = figure.subplots(1, len(layers), squeeze=False)[0]
        overlap = live.loc[live["layer"].isin(layers), "peer_overlap"].dropna()
        norm = Normalize(0.0, max(float(overlap.quantile(0.98)) if len(overlap) else 0.0, 1e-9))
        for axes, layer in zip(row, layers, strict=True):
            scatter = _draw_channels(axes, live[live["layer"] == layer], norm)
            axes.set_title(f"{layer}, {_epoch_title(epoch)}", fontsize=9)
            axes.set_xlabel("input capture $I_X$ (nats)")
        row[0].set_ylabel("task information $I_T$ (nats)")
        figure.colorbar(scatter, ax=row, label=r"peer overlap $\bar R_X$ (nats)", extend="max")
        figure.canvas.draw()
        return np.asarray(cast(FigureCanvasAgg, figure.canvas).buffer_rgba())[..., :3].copy()


def _plane_table(run: RunFolder) -> tuple[pd.DataFrame, list[int]]:
    try:
        table = run.trace
    except AbsentInput as absent:
        try:
            table = run.channels.assign(epoch=-1)
        except AbsentInput as other:
            raise AbsentInput(f"{absent} or {other}") from None
    return table, sorted({int(table["epoch"].min()), int(table["epoch"].max())})


def _epoch_title(epoch: int) -> str:
    return {-1: "analysed checkpoint", 0: "at initialisation", 1: "after 1 epoch"}.get(epoch, f"after {epoch} epochs")


def _thirds(layers: Sequence[str]) -> list[str]:
    """Returns the layer in the middle of the first, second and last third (all of them where there are three)."""
    places = np.array([1 / 6, 1 / 2, 5 / 6]) * len(layers) if len(layers) > 3 else np.arange(len(layers))
    return [layers[int(place)] for place in places]


def _draw_channels(axes: Axes, channels: pd.DataFrame, norm: Normalize) -> Any:
    size = 26 if len(channels) <= 128 else 12
    x, y, colour = (channels[name].to_numpy() for name in ("input_capture", "task_information", "peer_overlap"))
    return axes.scatter(
        x,
        y,
        c=np.nan_to_num(colour),
        norm=norm,
        cmap=drawing.OVERLAP_COLOURS,
        s=size,
        linewidths=0.4,
        edgecolors=drawing.HALO,
    )


def _draw_movement(row: Sequence[Axes], panels: Sequence[pd.DataFrame]) -> None:
    first, last = panels[0], panels[-1]
    if len(panels) < 2 or set(first.index) != set(last.index):  # removed channels renumber the others
        return
    columns = ["input_capture", "task_information"]
    begin, end = first[columns], last.loc[first.index, columns]
    x, y = np.stack([begin.to_numpy(), end.to_numpy()]).T.transpose(0, 2, 1)
    row[-1].plot(x, y, color=drawing.GREY, linewidth=0.5, alpha=0.45, zorder=0)


@register_section("coupling", "Coupling of the axes", place=70)
def draw_coupling(run: RunFolder) -> Picture:
    """Draws the Spearman correlation of I_X and I_T, every layer by every traced epoch, and its mean above."""
    coupling = couple_axes(run.trace)
    figure = new_figure(2.2 + max(1.2, min(0.24 * len(coupling), 12)))
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.3, max(1.2, 0.22 * len(coupling))))
    columns = np.arange(coupling.shape[1])
    top.axhline(0, color=drawing.GREY, linewidth=0.8)
    top.fill_between(columns, coupling.quantile(0.25), coupling.quantile(0.75), color=drawing.BLUE, alpha=0.18, lw=0)
    top.plot(columns, coupling.mean(), color=drawing.BLUE, marker="o" if len(columns) <= 40 else None, markersize=3)
    top.set(ylabel="mean over layers", xlim=(-0.5, len(columns) - 0.5))
    below.add_patch(
        Rectangle((0, 0), 1, 1, transform=below.transAxes, hatch="////", fc="white", ec=drawing.PALE, lw=0, zorder=-1)
    )
    image = below.imshow(coupling.to_numpy(), aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    below.set_yticks(np.arange(len(coupling)), list(coupling.index), fontsize=9 if len(coupling) <= 40 else 7)
    shown = columns[:: max(1, len(columns) // 20)]
    below.set_xticks(shown, [str(coupling.columns[i]) for i in shown])
    below.set_xlabel("epochs finished (0 = initialisation)")
    below.grid(visible=False)
    figure.colorbar(image, ax=below, label="Spearman ρ of $I_X$ and $I_T$", aspect=max(20, 1.2 * len(coupling)))
    for axes in (top, below):
        # the cut happens after its epoch's trace: half a column to the right
        drawing.mark_stages(
            axes, stages_if_any(run), lambda x: np.interp(x, coupling.columns, columns) + 0.5, axes is top
        )
    return Picture(
        figure,
        "Red: the channels that capture most of their input are also the ones that tell most of the task; blue: the "
        "reverse; pale: the two axes say different things. Layers run from input (top) to output; hatched cells are "
        "layers removed by then. Above: mean over layers, band from the first to the third quartile.",
    )


def couple_axes(trace: pd.DataFrame) -> pd.DataFrame:
    """Returns the cross-axis coupling of every layer at every traced epoch.

    Spearman's ρ of input capture and task information over the live channels of the layer; NaN below three of them
    or where one axis is constant.

    Rows are layers in forward order, columns epochs.
    """
    values = {key: coupling(rows) for key, rows in trace.groupby(["epoch", "layer"])}
    table = pd.Series(values, dtype=float).unstack(0)
    return table.reindex(index=layer_order(trace), columns=sorted(trace["epoch"].unique()))


def epoch_frames(
    live: pd.DataFrame, titles: dict[int, str], layers: Sequence[str], first: Sequence[str], most_overlap: float
) -> dict:
    """Returns the frames of the page's slider as plain values.

    Args:
        live: channel tables of all traced epochs without dead channels; with the column `width`, the layer's channels.
        titles: of each epoch, in order.
        layers: in forward order.
        first: layers that are kept where not all fit.
        most_overlap: where the colours end, in nats.

    Returns:
        `titles`; `overlap`, where the colours end; `colours`, from no overlap to that; `layers`, each with its `name`
        and a frame an epoch: `width`, `channel`, `x` (input capture), `y` (task information), `overlap`, in nats to
        three digits; None where the layer is not there.
    """
    epochs, layers = _fitting(live, list(titles), layers, first)
    groups = dict(tuple(live.groupby(["layer", "epoch"])))
    return {
        "titles": [titles[epoch] for epoch in epochs],
        "overlap": most_overlap,
        "colours": [to_hex(drawing.OVERLAP_COLOURS(share)) for share in np.linspace(0, 1, 16)],
        "layers": [
            {"name": name, "frames": [_frame(groups.get((name, epoch))) for epoch in epochs]} for name in layers
        ],
    }


def _fitting(
    live: pd.DataFrame, epochs: list[int], layers: Sequence[str], first: Sequence[str]
) -> tuple[list[int], list[str]]:
    """The epochs and layers that the page has room for."""
    sizes = live.groupby("layer").size() / max(len(epochs), 1)
    count = int(min(len(epochs), max(SHORTEST, MOST_CHANNELS // max(sizes.sum(), 1))))
    chosen = sorted({epochs[int(place)] for place in np.linspace(0, len(epochs) - 1, count)})
    room, kept = MOST_CHANNELS / len(chosen), set()
    for name in [*first, *(layer for layer in layers if layer not in first)]:
        room -= sizes[name]
        if room >= 0 or name == first[0]:
            kept.add(name)
    return chosen, [name for name in layers if name in kept]


def _frame(channels: pd.DataFrame | None) -> dict[str, Any] | None:
    if channels is None:
        return None
    x, y, overlap = ([_short(value) for value in channels[name]] for name in AXES)
    return {
        "width": int(channels["width"].iloc[0]),
        "channel": [int(channel) for channel in channels["channel"]],
        "x": x,
        "y": y,
        "overlap": overlap,
    }


def _short(value: float) -> float | None:
    """Three digits; None (JSON has no NaN) for what is not defined."""
    return float(f"{value:.3g}") if np.isfinite(value) else None
