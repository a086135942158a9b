"""Rank summaries of the channel table: coupling, collapse, dynamics, and intervals over model-seed units.

Tables are channel tables (columns of `lit_prune.measure`). A dead channel, or one with NaN in a column that is used, is
left out of the ranks. Every summary is NaN where it is not defined: fewer than three channels left, or a constant.

Source: the two-axis paper, sections 2.2, 2.3 and 3.1, table 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from lit_prune.errors import InputError

METRICS = (  # ‖w‖ stands for ‖w‖²: their ranks are the same
    "input_capture",
    "peer_overlap",
    "weight_norm",
    "task_information",
    "target_redundancy",
    "target_excess",
)
FEWEST = 3
RESAMPLES = 10_000  # draws of a bootstrap


@dataclass(frozen=True)
class Interval:
    """Bootstrap summary: mean of the units and percentile interval; NaN without units."""

    mean: float
    low: float
    high: float


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman correlation of two columns [n] over the entries where both are finite; ties get mean ranks.

    NaN for fewer than three entries or a constant column.
    """
    return float(rank_correlations(np.asarray(first)[:, None], np.asarray(second)[:, None])[0, 0])


def rank_correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman correlations [A, B] of the columns of [n, A] and [n, B]; each pair over the rows where both are finite.

    Raises:
        InputError: a different number of rows.
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if len(first) != len(second):
        raise InputError(f"columns: {len(first)} and {len(second)} entries; give the same channels on both sides")
    return np.array([[_spearman(a, b) for b in second.T] for a in first.T])


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman correlation of two columns [n]."""
    both = np.isfinite(first) & np.isfinite(second)
    if both.sum() < FEWEST:
        return np.nan
    ranks = rankdata(np.stack([first[both], second[both]]), axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    scale = np.sqrt((ranks**2).sum(1).prod())
    return float(ranks[0] @ ranks[1] / scale) if scale > 0 else np.nan


def live_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of channels that are not dead (all rows if the table has no column `dead`)."""
    return table[~table["dead"].astype(bool)] if "dead" in table else table


def coupling(layer: pd.DataFrame) -> float:
    """Cross-axis coupling ρ(I_X, I_T) of one layer, in [-1, 1]."""
    live = live_rows(layer)
    return rank_correlation(live["input_capture"], live["task_information"])


def collapse(layer: pd.DataFrame) -> float:
    """Collapse check ρ(I_T, Red_T) of one layer; at least 0.99 on trained networks."""
    live = live_rows(layer)
    return rank_correlation(live["task_information"], live["target_redundancy"])


def axis_matrix(table: pd.DataFrame) -> pd.DataFrame:
    """The 6×6 rank correlations of (I_X, R̄_X, ‖w‖², I_T, Red_T, Syn), ranked within each layer, pooled over layers.

    A rank counts as (rank - ½)/n, so that layers of any width n pool; rows with a NaN are left out.
    """
    layers = live_rows(table).dropna(subset=list(METRICS)).groupby("layer", sort=False)[list(METRICS)]
    ranks = (layers.rank() - 0.5) / layers.transform("size").to_numpy()[:, None]
    return pd.DataFrame(rank_correlations(ranks.to_numpy(), ranks.to_numpy()), index=METRICS, columns=METRICS)


def velocity(before: pd.DataFrame, after: pd.DataFrame) -> float:
    """Velocity coupling ρ(ΔI_X, ΔI_T) of one layer between two checkpoints.

    Args:
        before: the layer's rows at the earlier checkpoint.
        after: at the later one, the same channels; those dead at either are left out.
    """
    first, second = _matched(before, after)
    capture, task = ((second[name] - first[name]).to_numpy() for name in ("input_capture", "task_information"))
    return rank_correlation(capture, task)


def rank_persistence(table: pd.DataFrame, final: pd.DataFrame, column: str) -> float:
    """Rank persistence ρ(metric at an epoch, metric at the end) of one layer.

    Args:
        table: the layer's rows at an epoch.
        final: at the end of training, the same channels; those dead at either are left out.
        column: the metric, for instance "input_capture".
    """
    first, second = _matched(table, final)
    return rank_correlation(first[column], second[column])


def _matched(first: pd.DataFrame, second: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of the channels that live in both tables, indexed by channel, in the same order."""
    if first["layer"].nunique() > 1 or set(first["channel"]) != set(second["channel"]):
        raise InputError("tables: not the same channels of one layer; give one layer's rows at two checkpoints")
    first, second = (live_rows(rows).set_index("channel") for rows in (first, second))
    both = first.index.intersection(second.index)
    return first.loc[both], second.loc[both]


def unit_bootstrap(values: Sequence[float], units: Sequence, *, seed: int = 0) -> Interval:
    """Mean over model-seed units with a 95 % percentile bootstrap interval that resamples units, not layers.

    Layers of one network are not independent; so the mean over a unit's layers is one observation.

    Args:
        values: a statistic of each layer, NaN left out.
        units: the unit of each layer, for instance "resnet18/0".
        seed: of the draws.
    """
    means = _unit_means(values, units).to_numpy()
    if not len(means):
        return Interval(np.nan, np.nan, np.nan)
    draws = np.random.default_rng(seed).integers(len(means), size=(RESAMPLES, len(means)))
    low, high = np.quantile(means[draws].mean(1), [0.025, 0.975])
    return Interval(float(means.mean()), float(low), float(high))


def leave_one_out_means(values: Sequence[float], units: Sequence, architectures: Sequence) -> dict[str, float]:
    """Mean over model-seed units without each architecture in turn, by the name of the one left out."""
    frame = pd.DataFrame({"value": list(values), "unit": list(units), "architecture": list(architectures)})
    means = {}
    for name in dict.fromkeys(frame["architecture"]):
        rest = frame[frame["architecture"] != name]
        means[str(name)] = float(_unit_means(rest["value"], rest["unit"]).mean())
    return means


def _unit_means(values: Sequence[float], units: Sequence) -> pd.Series:
    """Mean of the finite values of each unit."""
    if len(values) != len(units):
        raise InputError(f"units: {len(units)} units for {len(values)} values; give one a value")
    series = pd.Series(np.asarray(values, dtype=float)).dropna()
    return series.groupby(pd.Series(list(units)).loc[series.index]).mean()
