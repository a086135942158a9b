"""Cluster-aware scores: which channels are alike decides together with what each is worth.

The rules hold for whole coupled groups: values and metrics are averaged over a group's layers first. The two-axis paper
names these methods and leaves the recipes open; they are this project's reading of its appendix C, of `definitions`
and of the authors' public code (KempnerInstitute/nodelens, MIT). The paper counts the `cap` family as local although
its score holds the target excess with a small weight.
"""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from lit_prune.scores.axes import composite_pid, scaled, weighted_sum
from lit_prune.scores.evidence import Evidence
from lit_prune.scores.groupings import LOCAL_FEATURES, RESTARTS, group_channels
from lit_prune.scores.method import SCORES, Method, register_score
from lit_prune.scores.outputs import taylor
from lit_prune.scores.units import (
    even_order,
    excess_between,
    follow,
    guarded_order,
    redundancy_between,
    to_layers,
    unit_matrices,
    unit_means,
)

CLUSTERS = 4
PROTECTED_SHARE = 0.3
ANNEALED_FROM, ANNEALED_TO = 0.7, 0.9  # sparsities
TIE_BREAK = 1e-3

Units = dict[str, Tensor]


@register_score("local", "labels", needs=("table",))
def cap(evidence: Evidence) -> dict[str, Tensor]:
    """Cluster-aware: n(I_X) + 0.5·n(Syn) - 0.3·n(R̄_X), dealt out in the order that guards the clusters.

    Channels are grouped by k-means (k = 4) on the standardised (I_X, R̄_X); the best 30 % of the cluster with the
    highest mean are protected, and no cluster is emptied before the others are down to one (`guarded_order`). The
    values of a group stay the same set, so a threshold over all groups means what it does without the rule.
    """
    values = _live_units(evidence, _cap_values(evidence))
    return to_layers(evidence, _guarded(evidence, values, PROTECTED_SHARE))


@register_score("local", "gradients", needs=("table", "saliency"))
def cap_qgw(evidence: Evidence) -> dict[str, Tensor]:
    """`cap` on √(n(taylor)·n(cap)), each channel's place in the order as a quantile of its group, in (0, 1)."""
    values = {group: (gradient * ours).sqrt() for group, (gradient, ours) in _both(evidence).items()}
    return to_layers(evidence, _guarded(evidence, values, PROTECTED_SHARE, _quantiles))


@register_score("local", "gradients", defaults=(None,), needs=("table", "saliency"))
def cap_a(evidence: Evidence, sparsity: float) -> dict[str, Tensor]:
    """Annealed `cap`: (1-w)·n(taylor) + w·n(cap), w from 0 at 70 % to 1 at 90 % of the channels removed.

    The protected share is 0.3·w; at w = 0 the order is that of `taylor`.

    Args:
        evidence: network and data.
        sparsity: share of the channels that will go, in [0, 1].
    """
    weight = min(1.0, max(0.0, (sparsity - ANNEALED_FROM) / (ANNEALED_TO - ANNEALED_FROM)))
    values = {group: (1 - weight) * gradient + weight * ours for group, (gradient, ours) in _both(evidence).items()}
    return to_layers(evidence, _guarded(evidence, values, weight * PROTECTED_SHARE) if weight else values)


@register_score("local", "labels", needs=("task_sums",))
def spectral_rs(evidence: Evidence) -> dict[str, Tensor]:
    """I_X dealt out so that every spectral cluster (k = 4) of the peer graph R loses the same fraction.

    The affinity is R_ij = g(ρ_ij) over its largest value, plus a thousandth of the target-excess graph S scaled alike,
    which decides between equals.
    """
    redundancy, excess = (unit_matrices(evidence, find(evidence)) for find in (redundancy_between, excess_between))
    affinities = {group: _unit_scale(redundancy[group]) + TIE_BREAK * _unit_scale(excess[group]) for group in excess}
    return _evenly(evidence, evidence.column("input_capture"), affinities)


@register_score("target", "labels", needs=("task_sums",))
def spectral_pid_rs(evidence: Evidence) -> dict[str, Tensor]:
    """`composite_pid` dealt out so that every spectral cluster (k = 4) of the target-excess graph S loses alike."""
    return _evenly(evidence, evidence.once(composite_pid), unit_matrices(evidence, excess_between(evidence)))


def _cap_values(evidence: Evidence) -> dict[str, Tensor]:
    return weighted_sum(evidence, input_capture=1.0, target_excess=0.5, peer_overlap=-0.3)


def _live_units(evidence: Evidence, values: dict[str, Tensor]) -> Units:
    """Mean over coupled layers of the values of live channels; NaN for units without one."""
    dead = evidence.dead()
    return unit_means(evidence, {layer: v.masked_fill(dead[layer], torch.nan) for layer, v in values.items()})


def _both(evidence: Evidence) -> dict[str, tuple[Tensor, Tensor]]:
    """n(taylor) and n(cap's sum) of each group's units, NaN for dead ones."""
    gradient, ours = _live_units(evidence, evidence.once(taylor)), _live_units(evidence, _cap_values(evidence))
    return {group: (_on_live(gradient[group], scaled), _on_live(ours[group], scaled)) for group in ours}


def _guarded(
    evidence: Evidence, values: Units, protected_share: float, deal: Callable[[Tensor, Tensor], Tensor] = follow
) -> Units:
    """Scores of each group's units in the guarded order of its k-means clusters: `deal(values, order)`."""
    metrics = [_live_units(evidence, evidence.column(name)) for name in LOCAL_FEATURES]
    found = {}
    for group, scores in values.items():
        features = torch.stack([metric[group] for metric in metrics], 1).nan_to_num(0.0)  # [size, 2]

        def dealt(live: Tensor, features: Tensor = features, scores: Tensor = scores) -> Tensor:
            clusters = kmeans_clusters(features[scores.isfinite()], evidence.seed)
            return deal(live, guarded_order(live, clusters, protected_share))

        found[group] = _on_live(scores, dealt)
    return found


def _evenly(evidence: Evidence, values: dict[str, Tensor], affinities: Units) -> dict[str, Tensor]:
    """Each group's values dealt out so that its spectral clusters lose the same fraction, by layer."""
    found = {}
    for group, scores in _live_units(evidence, values).items():

        def dealt(live: Tensor, affinity: Tensor = affinities[group], scores: Tensor = scores) -> Tensor:
            alive = scores.isfinite()
            return follow(live, even_order(live, spectral_clusters(affinity[alive][:, alive], evidence.seed)))

        found[group] = _on_live(scores, dealt)
    return to_layers(evidence, found)


def _on_live(values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of the finite values in their places; the others stay NaN."""
    alive = values.isfinite()
    found = torch.full_like(values, torch.nan)
    if alive.any():
        found[alive] = function(values[alive])
    return found


def _quantiles(values: Tensor, order: Tensor) -> Tensor:
    """Each channel's place in the order as a quantile, in (0, 1)."""
    return follow((torch.arange(len(values)).double() + 0.5) / len(values), order)


def _unit_scale(weights: Tensor) -> Tensor:
    largest = weights.max()
    return weights / largest if largest > 0 else weights


def kmeans_clusters(features: Tensor, seed: int, clusters: int = CLUSTERS) -> Tensor:
    """Seeded k-means labels of channels on standardised features [n, F], int64 [n]; fewer where channels are alike."""
    table = features.numpy()
    return torch.from_numpy(group_channels(table, seed, min(clusters, len(np.unique(table, axis=0))))).long()


def spectral_clusters(affinity: Tensor, seed: int, clusters: int = CLUSTERS) -> Tensor:
    """Spectral clusters of a weighted graph, int64 [n].

    k-means, seeded, on the rows, scaled to length 1, of the k leading eigenvectors of D^-½ A D^-½.

    Args:
        affinity: symmetric, ≥ 0, [n, n]; the diagonal is ignored.
        seed: of k-means.
        clusters: k; fewer where there are fewer distinct rows.

    Source: Ng, Jordan and Weiss 2001.
    """
    weights = affinity.double().clone().fill_diagonal_(0)
    scale = weights.sum(1).clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    count = min(clusters, len(weights))
    vectors = torch.linalg.eigh(weights * torch.outer(scale, scale)).eigenvectors[:, -count:]
    rows = torch.nn.functional.normalize(vectors, dim=1).round(decimals=9).numpy()
    count = min(count, len(np.unique(rows, axis=0)))
    return torch.from_numpy(KMeans(count, n_init=RESTARTS, random_state=seed).fit_predict(rows)).long()


@register_score("mixed", "gradients", defaults=(Method(SCORES["taylor"]), Method(SCORES["composite_ix"])))
def hybrid(evidence: Evidence, budgets: Method, order: Method) -> dict[str, Tensor]:
    """How many channels a layer loses from one score, which ones from another.

    The values of `budgets` inside each coupled group, dealt out in the order of `order`: any global threshold, under
    any normalisation, cuts each group to the width that `budgets` gives it, and inside keeps what `order` ranks best.
    Under uniform or given budgets it is `order` alone.

    Source: the two-axis paper, appendix C (budgets `taylor`, ranks `composite_ix`).
    """
    sizes, ranks = (unit_means(evidence, method.ranks(evidence)) for method in (budgets, order))
    dealt = {group: follow(sizes[group], ranks[group].argsort(stable=True)) for group in sizes if group in ranks}
    return to_layers(evidence, dealt)
