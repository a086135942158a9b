"""How channels move on the two axes from checkpoint to checkpoint."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from lit_prune.measurement.summaries import coupling, rank_persistence, velocity

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
    for layer, of_layer in trace.groupby("layer", sort=False):
        tables = {epoch: rows_of_epoch for epoch, rows_of_epoch in of_layer.groupby("epoch")}
        last, before = tables[max(tables)], None
        for epoch, present in tables.items():
            moved = np.nan if before is None else _or_nan(velocity, before, present)
            persistence = [_or_nan(rank_persistence, present, last, column) for column in AXES]
            rows.append([epoch, layer, present["depth"].iloc[0], coupling(present), moved, *persistence])
            before = present
    columns = ["epoch", "layer", "depth", "coupling", "velocity", "persistence_capture", "persistence_task"]
    return pd.DataFrame(rows, columns=columns).sort_values(["epoch", "depth"], kind="stable", ignore_index=True)


def _or_nan(compare: Callable[..., float], first: pd.DataFrame, second: pd.DataFrame, *more: str) -> float:
    """Result of `compare`; NaN if the layer's width differs."""
    return compare(first, second, *more) if len(first) == len(second) else np.nan
