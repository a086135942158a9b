"""Whether the local axis predicts the damage of lesions beyond the weight norm.

Source: the two-axis paper, appendix J and section 4.1.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import norm

from lit_prune.errors import InputError
from lit_prune.lab.analyze.evidence import Analysis
from lit_prune.lab.analyze.extras import Frames, register_extra
from lit_prune.measurement.summaries import live_rows
from lit_prune.scores.groupings import standardise

COMPONENTS = {
    "norm": ("weight_norm",),
    "capture": ("input_capture",),
    "overlap": ("peer_overlap",),
    "capture_overlap": ("input_capture", "peer_overlap"),
    "norm_overlap": ("weight_norm", "peer_overlap"),
    "task": ("task_information",),
}


@dataclass(frozen=True)
class WinRate:
    """Share of matched pairs won, with its Wilson interval."""

    pairs: int
    rate: float
    low: float
    high: float


def wilson(wins: float, pairs: int) -> WinRate:
    """Win rate with Wilson's 95 % interval; ties count one half.

    Source: Wilson 1927.
    """
    if not pairs:
        return WinRate(0, *[float("nan")] * 3)
    z, rate = norm.ppf(0.975), wins / pairs
    centre = (rate + z**2 / (2 * pairs)) / (1 + z**2 / pairs)
    half = z * np.sqrt(rate * (1 - rate) / pairs + z**2 / (4 * pairs**2)) / (1 + z**2 / pairs)
    return WinRate(pairs, float(rate), float(centre - half), float(centre + half))


def matched_pairs(table: pd.DataFrame, score: str = "peer_overlap") -> WinRate:
    """How often, of two channels of nearly the same I_X, the one of larger score has the smaller damage.

    Within each layer the live channels are sorted by I_X and paired with their neighbour, each used once; of an odd
    number the last is left out.

    Args:
        table: columns layer, `score`, `input_capture`, `damage`.
        score: metric that should predict removability.
    """
    wins, pairs = 0.0, 0
    for _, rows in live_rows(table).dropna(subset=[score, "input_capture", "damage"]).groupby("layer", sort=False):
        ordered = rows.sort_values("input_capture", kind="stable")[[score, "damage"]].to_numpy(dtype=float)
        ordered = ordered[: len(ordered) // 2 * 2].reshape(-1, 2, 2)  # [pairs, two channels, score and damage]
        sides = np.sign(ordered[:, 0] - ordered[:, 1])
        wins += float(((1 - sides[:, 0] * sides[:, 1]) / 2).sum())
        pairs += len(ordered)
    return wilson(wins, pairs)


def component_r2(table: pd.DataFrame, columns: tuple[str, ...]) -> float:
    """R² of the damage on some metrics, all standardised within the layer, pooled over layers."""
    rows = live_rows(table).dropna(subset=[*columns, "damage"])
    sizes = rows.groupby("layer")["layer"].transform("size")
    parts = [part for _, part in rows[sizes > 2].groupby("layer", sort=False)]
    if not parts:
        return float("nan")
    scaled = np.concatenate([standardise(part[[*columns, "damage"]].to_numpy(dtype=float)) for part in parts])
    features, damage = scaled[:, :-1], scaled[:, -1]
    residual = damage - features @ np.linalg.lstsq(features, damage, rcond=None)[0]
    total = damage @ damage
    return float(1 - residual @ residual / total) if total > 0 else float("nan")


@register_extra("table")
def damage(analysis: Analysis) -> Frames:
    """Table `damage`: what predicts the damage of lesions.

    Columns: quantity, value, low, high, channels. `r2_<metrics>`: R² of the damage, standardised within layers;
    `matched_overlap`: the win rate of larger R̄_X at matched I_X, with Wilson's interval (`channels` counts pairs).

    Raises:
        InputError: no lesions.
    """
    if analysis.lesions is None or "damage" not in analysis.lesions:
        raise InputError("extras: 'damage' needs lesions with the columns layer, channel, damage; run `lesion` first")
    lesions = analysis.lesions[["layer", "channel", "damage"]]
    table = analysis.channels.merge(lesions, on=["layer", "channel"])
    rows = [
        {"quantity": f"r2_{name}", "value": component_r2(table, columns), "channels": len(table)}
        for name, columns in COMPONENTS.items()
    ]
    won = matched_pairs(table)
    rows.append(
        {"quantity": "matched_overlap", "value": won.rate, "low": won.low, "high": won.high, "channels": won.pairs}
    )
    return {"table": pd.DataFrame(rows)}
