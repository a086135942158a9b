"""Groupings of a layer's channels on each axis, and whether they agree.

Source: the two-axis paper, section 2.2 and figure 2C.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from lit_prune.errors import InputError
from lit_prune.measurement.summaries import live_rows

CLUSTERS = 3
RESTARTS = 10
SHUFFLES = 200
LOCAL_FEATURES = ("input_capture", "peer_overlap")
TARGET_FEATURES = ("task_information", "target_excess")


@dataclass(frozen=True)
class GroupingAgreement:
    """Agreement of the local and the target grouping of one layer; NaN where not defined.

    Attributes:
        rand_index: adjusted Rand index, 1 for equal groupings, 0 expected by chance.
        null_mean: its mean over shuffles of one grouping.
        null_95: its 95th percentile over shuffles.
        local_silhouette: mean silhouette of the grouping on (I_X, R̄_X), in [-1, 1].
        target_silhouette: that of the grouping on (I_T, Syn).
    """

    rand_index: float
    null_mean: float
    null_95: float
    local_silhouette: float
    target_silhouette: float


def standardise(features: np.ndarray) -> np.ndarray:
    """Columns [n, F] with mean 0 and standard deviation 1; a constant column becomes 0."""
    centred = features - features.mean(0)
    deviation = centred.std(0)
    return centred / np.where(deviation > 0, deviation, 1.0)


def group_channels(features: np.ndarray, seed: int = 0, clusters: int = CLUSTERS) -> np.ndarray:
    """k-means groups of channels on standardised features, int [n]; 10 restarts, k-means++, Lloyd.

    Args:
        features: [n, F], finite.
        seed: of the restarts.
        clusters: k.

    Raises:
        InputError: fewer distinct channels than groups.
    """
    distinct = len(np.unique(features, axis=0))
    if distinct < clusters:
        raise InputError(f"features: {distinct} distinct channels for {clusters} groups; give at least {clusters}")
    return KMeans(clusters, n_init=RESTARTS, random_state=seed).fit_predict(standardise(features))


def adjusted_rand_index(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Adjusted Rand index of a grouping [n] with one or many others [n] or [S, n], [] or [S].

    (Σ_ab C(n_ab,2) - E) / (½·(A + B) - E), A = Σ_a C(n_a,2), B = Σ_b C(n_b,2), E = A·B/C(n,2), from the contingency
    counts n_ab; 1 where both groupings are trivial. Labels are any integers.

    Source: Hubert and Arabie 1985.
    """
    first, second = (np.unique(labels, return_inverse=True)[1].reshape(np.shape(labels)) for labels in (first, second))
    one_hot = np.eye(first.max() + 1)[first]  # [n, A]
    others = np.eye(second.max() + 1)[second]  # [..., n, B]
    counts = np.einsum("na,...nb->...ab", one_hot, others, optimize=True)
    together = _pairs(counts).sum((-2, -1))
    rows, columns = _pairs(counts.sum(-1)).sum(-1), _pairs(counts.sum(-2)).sum(-1)
    expected = rows * columns / max(_pairs(len(first)), 1)
    room = (rows + columns) / 2 - expected
    return np.where(room > 0, (together - expected) / np.where(room > 0, room, 1.0), 1.0)


def _pairs(count: Any) -> Any:
    """Number of pairs, C(count, 2)."""
    return count * (count - 1) / 2


def permutation_null(first: np.ndarray, second: np.ndarray, shuffles: int = SHUFFLES, seed: int = 0) -> np.ndarray:
    """Adjusted Rand indices of `first` with seeded shuffles of `second`, [shuffles]."""
    generator = np.random.default_rng(seed)
    shuffled = generator.permuted(np.broadcast_to(second, (shuffles, len(second))), axis=1)
    return adjusted_rand_index(first, shuffled)


def grouping_agreement(layer: pd.DataFrame, seed: int = 0) -> GroupingAgreement:
    """Whether grouping a layer's channels on (I_X, R̄_X) and on (I_T, Syn) gives the same groups.

    Args:
        layer: one layer's rows of the channel table; dead channels and rows with NaN are left out.
        seed: of k-means and of the shuffles.

    Returns:
        All NaN if an axis has fewer than four channels or fewer distinct ones than groups.
    """
    live = live_rows(layer).dropna(subset=[*LOCAL_FEATURES, *TARGET_FEATURES])
    local, target = live[list(LOCAL_FEATURES)].to_numpy(), live[list(TARGET_FEATURES)].to_numpy()
    if len(live) <= CLUSTERS or min(len(np.unique(part, axis=0)) for part in (local, target)) < CLUSTERS:
        return GroupingAgreement(*(math.nan,) * 5)
    first, second = group_channels(local, seed), group_channels(target, seed)
    null = permutation_null(first, second, seed=seed)
    return GroupingAgreement(
        rand_index=float(adjusted_rand_index(first, second)),
        null_mean=float(null.mean()),
        null_95=float(np.quantile(null, 0.95)),
        local_silhouette=float(silhouette_score(standardise(local), first)),
        target_silhouette=float(silhouette_score(standardise(target), second)),
    )
