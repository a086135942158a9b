"""Logged scalars of a run, read from TensorBoard event files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from lit_prune.errors import InputError


def read_scalars(folder: str | Path) -> dict[str, pd.DataFrame]:
    """Returns every scalar logged below `folder`, all event files merged.

    A resumed run writes a further event file and repeats the steps between its checkpoint and the interruption: of
    the values of one tag at one step the one written last (by wall time) is kept.

    Args:
        folder: folder searched recursively for `events.out.tfevents.*`.

    Returns:
        tag -> table with the columns `step` (int, strictly increasing) and `value` (float); empty without event files.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator  # 1 s to import

    events: dict[str, list[tuple[float, int, float]]] = {}
    for file in sorted(Path(folder).rglob("events.out.tfevents.*")):
        accumulator = EventAccumulator(str(file), size_guidance={SCALARS: 0}).Reload()
        for tag in accumulator.Tags()[SCALARS]:
            rows = ((event.wall_time, event.step, event.value) for event in accumulator.Scalars(tag))
            events.setdefault(tag, []).extend(rows)
    return {tag: _merge(rows) for tag, rows in events.items()}


def read_csv_scalars(folder: str | Path) -> dict[str, pd.DataFrame]:
    """As `read_scalars`, of the `metrics.csv` files that Lightning's CSVLogger writes below `folder`."""
    found: dict[str, list[tuple[float, int, float]]] = {}
    for order, file in enumerate(sorted(Path(folder).rglob("metrics.csv"), key=lambda file: file.stat().st_mtime)):
        try:
            table = pd.read_csv(file)
        except (ValueError, OSError) as error:
            raise InputError(f"{file} cannot be read ({error}); restore or delete it") from error
        for tag in (column for column in table.columns if column != "step" and "step" in table):
            rows = table[["step", tag]].dropna()
            values = pd.to_numeric(rows[tag], errors="coerce")
            steps = rows["step"].astype(int)
            found.setdefault(tag, []).extend((order, s, v) for s, v in zip(steps, values, strict=True) if v == v)
    return {tag: _merge(rows) for tag, rows in found.items()}


def _merge(rows: list[tuple[float, int, float]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["wall_time", "step", "value"]).sort_values("wall_time", kind="stable")
    table = table.drop_duplicates("step", keep="last").sort_values("step")
    return table[["step", "value"]].reset_index(drop=True)


def find_curve(scalars: Mapping[str, pd.DataFrame], tag: str) -> pd.DataFrame | None:
    """Returns the curve of `tag`, of Lightning's `tag_epoch`, or of `tag_step`, whichever exists first."""
    return next((scalars[name] for name in (tag, f"{tag}_epoch", f"{tag}_step") if name in scalars), None)


def steps_to_epochs(steps: np.ndarray, scalars: Mapping[str, pd.DataFrame]) -> np.ndarray | None:
    """Epochs finished at each step, float [n], linear within an epoch; None where the tag `epoch` was not logged.

    Lightning logs the running epoch `e` (from 0) beside every scalar; the last step with `e` closes epoch `e`, so
    that there `e + 1` epochs are finished.
    """
    if "epoch" not in scalars:
        return None
    last = scalars["epoch"].groupby("value")["step"].max().sort_index()
    return np.interp(steps, [-1, *last.to_numpy()], [0.0, *(last.index.to_numpy() + 1.0)])
