"""What the slider of the page shows: the channels of every layer on the two axes at each traced epoch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import to_hex

from lit_prune.report import drawing

MOST_CHANNELS = 25_000
"""Channels × epochs that the page holds, about 30 characters each; beyond, epochs are left out, then layers."""
SHORTEST = 5  # epochs that are always kept
AXES = ("input_capture", "task_information", "peer_overlap")


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
