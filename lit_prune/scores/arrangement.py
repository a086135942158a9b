"""Orders of removal inside a layer, and scores that follow them. Plain tensors in, plain tensors out."""

import torch
from torch import Tensor


def follow(values: Tensor, order: Tensor) -> Tensor:
    """The values [N] dealt out anew: the smallest to the first channel of `order`, the largest to the last.

    The layer keeps its distribution of values, so a threshold over all layers takes as many channels from it as
    before; only which ones is decided by the order.

    Args:
        values: [N].
        order: channels, first removed first, int64 [N].
    """
    dealt = torch.empty_like(values)
    dealt[order] = values.sort().values
    return dealt


def even_order(values: Tensor, clusters: Tensor) -> Tensor:
    """Removal order that takes the same fraction from every cluster, inside each the smallest values first.

    The j-th channel (from 0) to leave a cluster of n has the place (j + ½)/n; the channels up to any place t are, of
    every cluster, the share t to within half a channel. Ties between clusters go to the smaller value.

    Args:
        values: [N].
        clusters: labels from 0, int64 [N].

    Returns:
        Channels, first removed first, int64 [N].
    """
    inside = _sorted_by(values, clusters)
    sizes = torch.bincount(clusters)
    starts = sizes.cumsum(0) - sizes
    place = torch.empty_like(values)
    place[inside] = (torch.arange(len(values)) - starts[clusters[inside]] + 0.5).double() / sizes[clusters[inside]]
    return _sorted_by(values, place)


def guarded_order(values: Tensor, clusters: Tensor, protected_share: float) -> Tensor:
    """Removal order of the cluster-aware rule: ordinary channels, then protected ones, then the last of each cluster.

    Protected is the best share of the cluster with the highest mean value; the last of a cluster is its best channel.
    So no cluster is emptied before all others are down to one.

    Args:
        values: [N].
        clusters: labels from 0, int64 [N].
        protected_share: in [0, 1]; the number of channels is rounded to the nearest.

    Returns:
        Channels, first removed first, int64 [N].
    """
    sizes = torch.bincount(clusters)
    means = torch.bincount(clusters, weights=values) / sizes.clamp_min(1)
    highest = torch.where(sizes > 0, means, -torch.inf).argmax()
    inside = _sorted_by(values, clusters)
    from_top = torch.empty_like(clusters)  # 0 for the best of its cluster
    from_top[inside] = sizes.cumsum(0)[clusters[inside]] - 1 - torch.arange(len(values))
    protected = (clusters == highest) & (from_top < torch.floor(protected_share * sizes[highest] + 0.5))
    stage = torch.where(from_top == 0, 2, protected.long())
    return _sorted_by(values, stage)


def _sorted_by(values: Tensor, first: Tensor) -> Tensor:
    """Indices sorted by `first`, then by value, then by index."""
    order = values.argsort(stable=True)
    return order[first[order].argsort(stable=True)]
