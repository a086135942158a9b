"""How channels move on the two axes from checkpoint to checkpoint."""

import numpy as np
import pandas as pd

from lit_prune.measurement.summaries import rank_correlation

AXES = ["input_capture", "task_information"]


def dynamics_table(trace: pd.DataFrame) -> pd.DataFrame:
    """Coupling, velocity and rank persistence of every layer at every traced epoch.

    Columns: epoch, layer, depth, coupling ρ(I_X, I_T); velocity ρ(ΔI_X, ΔI_T) since the traced epoch before;
    persistence_capture and persistence_task, Spearman correlations of I_X and I_T with the same channels' values at
    the layer's last traced epoch. All over channels that live at both times; NaN where not defined, so also across an
    epoch at which channels of the layer were removed, for then channels cannot be told apart by their index.

    Args:
        trace: channel tables of several epochs with the column `epoch`.

    Source: the two-axis paper, section 3.1 and figures 4A to 4C.
    """
    rows = []
    for layer, rows_of_layer in trace.groupby("layer", sort=False):
        values = {epoch: _values(rows) for epoch, rows in rows_of_layer.groupby("epoch")}
        depths = rows_of_layer.groupby("epoch")["depth"].first()
        last = values[max(values)]
        before = None
        for epoch, present in values.items():
            velocity = np.nan if before is None else _matched(before, present, lambda a, b: _couple(b - a))
            persistence = [
                _matched(present, last, lambda a, b, c=c: rank_correlation(a[:, c], b[:, c])) for c in (0, 1)
            ]
            rows.append([epoch, layer, depths[epoch], _couple(present), velocity, *persistence])
            before = present
    columns = ["epoch", "layer", "depth", "coupling", "velocity", "persistence_capture", "persistence_task"]
    return pd.DataFrame(rows, columns=columns).sort_values(["epoch", "depth"], kind="stable", ignore_index=True)


def _values(rows: pd.DataFrame) -> np.ndarray:
    """I_X and I_T in channel order, [N, 2]; NaN rows for dead channels."""
    rows = rows.sort_values("channel")
    values = rows[AXES].to_numpy(dtype=float, copy=True)
    if "dead" in rows:
        values[rows["dead"].to_numpy(dtype=bool)] = np.nan
    return values


def _couple(values: np.ndarray) -> float:
    return rank_correlation(values[:, 0], values[:, 1])


def _matched(first: np.ndarray, second: np.ndarray, compare) -> float:
    """Result of `compare`, NaN if the layer's width differs."""
    return compare(first, second) if len(first) == len(second) else np.nan
