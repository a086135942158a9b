"""What the tables of lesions say: does the damage follow the axes, do peers stand in for a channel.

A cell is one layer of one network. Dead channels are left out everywhere.

Source: the two-axis paper, section 4.1, appendix K.2, tables 15 and 16, figure 5.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from lit_prune.lab.analyze.damage import COMPONENTS, component_r2, matched_pairs, wilson
from lit_prune.measurement.summaries import Interval, live_rows, rank_correlation
from lit_prune.scores.groupings import standardise

Frames = dict[str, pd.DataFrame]
THRESHOLDS = (1e-4, 1e-3, 5e-3)  # nats
PREDICTORS = ("peer_r2", "input_capture", "task_information")
BINS = 5
FEWEST_IN_BIN = 4
RESAMPLES = 2000
CHUNK_DRAWS = 2**22
SCORES: dict[str, tuple[tuple[str, int], ...]] = {
    "-capture": (("input_capture", -1),),
    "-norm": (("weight_norm", -1),),
    "overlap": (("peer_overlap", 1),),
    "peer_r2": (("peer_r2", 1),),
    "hull_size": (("hull_size", 1),),
    "compact": (("compact_support", 1),),
    "-capture+overlap": (("input_capture", -1), ("peer_overlap", 1)),
    "-capture+compact": (("input_capture", -1), ("compact_support", 1)),
    "-capture+peer_r2": (("input_capture", -1), ("peer_r2", 1)),
    "-task": (("task_information", -1),),
    "-excess": (("target_excess", -1),),
}
"""Scores, larger = safer to remove: sums of metrics standardised within the cell, with their signs."""


def lesion_tables(lesions: pd.DataFrame, seed: int = 0) -> Frames:
    """All tables of one or more networks' lesions.

    Args:
        lesions: columns of `lesions.parquet`; `layer` names the cell.
        seed: of the bootstrap.

    Returns:
        `thresholds`, `matched_task`, `ranking`, `ranking_layers`, `components`; columns: see the functions here.
    """
    lesions = live_rows(lesions)
    by_layer = rank_damage(lesions)
    return {
        "thresholds": threshold_table(lesions),
        "matched_task": matched_task_table(lesions, seed),
        "ranking": ranking_table(lesions, by_layer),
        "ranking_layers": by_layer,
        "components": components_table(lesions),
    }


def threshold_table(lesions: pd.DataFrame, thresholds: Sequence[float] = THRESHOLDS) -> pd.DataFrame:
    """Peer replacement of the channels whose lesion does more damage than a threshold (the paper's table 15).

    Columns: threshold (nats), channels, noise (median standard error of their damage, nats: a threshold below it sorts
    noise), median_recovery, helped (share with recovery above 0) with its Wilson interval
    helped_low and helped_high, peer_r2 and task_information (Spearman correlation of each with the recovery, pooled).

    Args:
        lesions: columns damage, damage_error, recovery, peer_r2, task_information.
        thresholds: nats.
    """
    rows = []
    for threshold in thresholds:
        some = lesions[lesions["damage"] > threshold]
        helped = wilson(float((some["recovery"] > 0).sum()), len(some))
        row = {"threshold": threshold, "channels": len(some), "noise": some["damage_error"].median()}
        row["median_recovery"] = some["recovery"].median()
        row |= {"helped": helped.rate, "helped_low": helped.low, "helped_high": helped.high}
        for name in ("peer_r2", "task_information"):
            row[name] = rank_correlation(some[name], some["recovery"])
        rows.append(row)
    return pd.DataFrame(rows)


def matched_task_table(lesions: pd.DataFrame, seed: int = 0, thresholds: Sequence[float] = THRESHOLDS) -> pd.DataFrame:
    """What predicts recovery among channels of like task information (the paper's table 16).

    The channels above the threshold are cut into 5 equal-frequency bins of I_T within each cell (fewer where that
    leaves less than 4 channels in a bin; smaller cells are left out). Predictors and recovery are taken relative to
    their medians in the bin, then pooled. A bin is won if the half of larger peer R² has the larger median recovery; a
    tie counts one half. The paper does not say what it subtracts, nor how many bins it takes.

    Columns: threshold, channels, for each predictor its Spearman correlation with the 95 % bootstrap interval
    <predictor>_low and <predictor>_high, bins, high_peer_win with its Wilson interval.

    Args:
        lesions: columns layer, damage, recovery, task_information and the predictors.
        seed: of the bootstrap.
        thresholds: nats.
    """
    rows = []
    for threshold in thresholds:
        table = match_on_task(lesions[lesions["damage"] > threshold])
        row = {"threshold": threshold, "channels": len(table)}
        for name in PREDICTORS:
            interval = bootstrap_correlation(table[name].to_numpy(), table["recovery"].to_numpy(), seed=seed)
            row |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        wins = [half_won(rows) for _, rows in table.groupby(["layer", "bin"], sort=False)]
        won = wilson(float(sum(wins)), len(wins))
        row |= {"bins": won.pairs, "high_peer_win": won.rate, "win_low": won.low, "win_high": won.high}
        rows.append(row)
    return pd.DataFrame(rows)


def match_on_task(lesions: pd.DataFrame, bins: int = BINS) -> pd.DataFrame:
    """Rows with the column `bin` (of I_T within the layer); predictors and recovery relative to the bin's medians."""
    columns = [*PREDICTORS, "recovery"]
    table = lesions.dropna(subset=columns)[["layer", *columns]].reset_index(drop=True)
    groups = table.groupby("layer", sort=False)["task_information"]
    sizes = groups.transform("size")
    place = (groups.rank(method="first") - 1) / sizes
    table["bin"] = np.floor(place * (sizes // FEWEST_IN_BIN).clip(1, bins)).astype(int)
    inside = table.groupby(["layer", "bin"], sort=False)
    table[columns] -= inside[columns].transform("median")
    return table[inside["recovery"].transform("size") >= FEWEST_IN_BIN]


def half_won(rows: pd.DataFrame) -> float:
    """1 if the half of larger peer R² has the larger median recovery, ½ if they tie, else 0.

    The middle row of an odd number belongs to neither half.
    """
    ordered = rows.sort_values("peer_r2", kind="stable")["recovery"].to_numpy()
    half = len(ordered) // 2
    return 0.5 + 0.5 * float(np.sign(np.median(ordered[-half:]) - np.median(ordered[:half])))


def bootstrap_correlation(
    first: np.ndarray, second: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Spearman correlation of two columns [n] with a 95 % percentile bootstrap interval that resamples the channels.

    `mean` is the correlation of the sample itself; all are NaN below three channels.
    """
    estimate = rank_correlation(first, second)
    if not np.isfinite(estimate):
        return Interval(estimate, np.nan, np.nan)
    random, found = np.random.default_rng(seed), []
    step = max(1, CHUNK_DRAWS // len(first))
    for start in range(0, resamples, step):
        draws = random.integers(len(first), size=(min(step, resamples - start), len(first)))
        found.append(_row_correlations(rankdata(first[draws], axis=1), rankdata(second[draws], axis=1)))
    low, high = np.nanquantile(np.concatenate(found), [0.025, 0.975])
    return Interval(estimate, float(low), float(high))


def _row_correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pearson correlation of each row of [B, n] with the same row of the other; NaN where one is constant."""
    first = first - first.mean(1, keepdims=True)
    second = second - second.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (first * second).sum(1) / np.sqrt((first**2).sum(1) * (second**2).sum(1))


def add_scores(lesions: pd.DataFrame) -> pd.DataFrame:
    """The table with a column for each of `SCORES`."""
    parts = []
    for _, rows in lesions.groupby("layer", sort=False):
        scores = {name: _score(rows, terms) for name, terms in SCORES.items()}
        parts.append(rows.assign(**scores))
    return pd.concat(parts) if parts else lesions.assign(**{name: [] for name in SCORES})


def _score(rows: pd.DataFrame, terms: Sequence[tuple[str, int]]) -> np.ndarray:
    """Sum of the signed metrics of one cell, standardised over the channels that have them."""
    columns, signs = [name for name, _ in terms], np.array([sign for _, sign in terms])
    values = rows[columns].to_numpy(dtype=float)
    defined = np.isfinite(values).all(1)
    score = np.full(len(rows), np.nan)
    if defined.any():
        score[defined] = standardise(values[defined]) @ signs
    return score


def rank_damage(lesions: pd.DataFrame) -> pd.DataFrame:
    """Agreement of each score with low damage, layer by layer.

    Columns: layer, depth, score, agreement (Spearman correlation of the score with -damage), channels.
    """
    rows = []
    for layer, cell in add_scores(lesions).groupby("layer", sort=False):
        place = {"layer": layer, "depth": cell["depth"].iloc[0]}
        for name in SCORES:
            agreement = rank_correlation(cell[name], -cell["damage"])
            rows.append(place | {"score": name, "agreement": agreement, "channels": int(cell[name].notna().sum())})
    return pd.DataFrame(rows, columns=["layer", "depth", "score", "agreement", "channels"])


def ranking_table(lesions: pd.DataFrame, by_layer: pd.DataFrame) -> pd.DataFrame:
    """Which score ranks the damage (the paper's figure 5).

    Columns: score; agreement and standard_error over layers of the Spearman correlation with low damage; layers;
    pooled, the same correlation after ranking within layers, all together; matched_win, how often of two channels of
    like I_X the one of larger score has the smaller damage, with its Wilson interval, and pairs.
    """
    table, rows = add_scores(lesions), []
    for name in SCORES:
        values = by_layer.loc[by_layer["score"] == name, "agreement"].dropna()
        both = table.dropna(subset=[name, "damage"])
        groups = both.groupby("layer", sort=False)
        ranks = groups[[name, "damage"]].rank() / groups[name].transform("size").to_numpy()[:, None]
        won = matched_pairs(table, score=name)
        row = {"score": name, "agreement": values.mean(), "standard_error": values.sem(), "layers": len(values)}
        row["pooled"] = rank_correlation(ranks[name], -ranks["damage"])
        row |= {"matched_win": won.rate, "win_low": won.low, "win_high": won.high, "pairs": won.pairs}
        rows.append(row)
    return pd.DataFrame(rows)


def components_table(lesions: pd.DataFrame) -> pd.DataFrame:
    """R² of the damage on groups of metrics, all standardised within layers: columns metrics, r2, channels."""
    rows = [
        {"metrics": name, "r2": component_r2(lesions, columns), "channels": len(lesions)}
        for name, columns in COMPONENTS.items()
    ]
    return pd.DataFrame(rows)
