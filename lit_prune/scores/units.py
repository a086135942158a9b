"""Units of coupled layers: values of layers to values of units and back, relations between units, orders of removal."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_prune.measurement import local_axis
from lit_prune.measurement.channel_table import target_correlations, target_deviation
from lit_prune.measurement.layers import out_channels
from lit_prune.measurement.sums import LayerSums
from lit_prune.scores.evidence import Evidence
from lit_prune.scores.graphs import excess_graph, redundancy_graph


def unit_means(evidence: Evidence, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean of each unit's values over its coupled layers, those without a value (NaN) left out.

    Args:
        evidence: says what is coupled.
        values: layer -> [N]; groups without any of these layers are absent from the result.

    Returns:
        Group name -> [size].
    """
    found = {}
    for group, parts in evidence.couplings.items():
        rows = [values[layer][positions].nanmean(1) for layer, positions in parts if layer in values]
        if rows:
            found[group] = torch.stack(rows).nanmean(0)
    return found


def to_layers(evidence: Evidence, units: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The units' values [size] at every coupled layer's channels [N]; NaN at channels of groups that are not given.

    Heads of an attention whose projections are no layers, such as `nn.MultiheadAttention`, have theirs under the name
    of their group.
    """
    found: dict[str, Tensor] = {}
    for group, values in units.items():
        for layer, positions in evidence.couplings.get(group, ()):
            channels = out_channels(evidence.layers[layer])
            vector = found.setdefault(layer, torch.full((channels,), torch.nan, dtype=torch.float64))
            vector[positions] = values[:, None]
    layers = {layer: found[layer] for layer in evidence.layers if layer in found}
    return layers | {group: values for group, values in units.items() if group in evidence.bare_heads}


def unit_matrices(evidence: Evidence, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean over coupled layers of relations between channels, [size, size]; 0 where no layer has a value.

    Args:
        evidence: says what is coupled.
        matrices: layer -> [N, N].
    """
    found = {}
    for group, parts in evidence.couplings.items():
        blocks = []
        for layer, positions in parts:
            if layer in matrices:
                size, width = positions.shape
                flat = positions.flatten()
                blocks.append(matrices[layer][flat][:, flat].view(size, width, size, width).nanmean((1, 3)))
        if blocks:
            found[group] = torch.stack(blocks).nanmean(0).nan_to_num(0.0)
    return found


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


def correlations(sums: LayerSums) -> Tensor:
    """ρ over images and positions, [N, N]; NaN in the rows and columns of dead channels."""
    joint = sums.outputs.covariance().cpu()
    return _without_dead(local_axis.correlation_matrix(joint), sums)


def redundancy_between(evidence: Evidence) -> dict[str, Tensor]:
    """R_ij = g(ρ_ij) of each layer's channels, nats, [N, N], diagonal 0."""
    return {layer: redundancy_graph(correlations(sums)) for layer, sums in evidence.sums.layers.items()}


def excess_between(evidence: Evidence) -> dict[str, Tensor]:
    """S_ij, the target excess of each pair, nats, [N, N], diagonal 0."""
    known = evidence.collected("task_sums")
    deviation, found = target_deviation(known), {}
    for layer, sums in known.layers.items():
        task, between = target_correlations(sums.to("cpu"), deviation)
        found[layer] = _without_dead(excess_graph(task[:, 0], between), sums)
    return found


def _without_dead(matrix: Tensor, sums: LayerSums) -> Tensor:
    dead = local_axis.dead_channels(local_axis.signal_power(sums.outputs)).cpu()
    return matrix.masked_fill(dead[:, None] | dead, torch.nan)
