"""Pairwise relations between the channels of each layer, from the evidence's sums; NaN at dead channels."""

import torch
from torch import Tensor

from lit_prune.measurement import local_axis
from lit_prune.measurement.channel_table import target_correlations, target_deviation
from lit_prune.measurement.sums import LayerSums
from lit_prune.scores.evidence import Evidence
from lit_prune.scores.graphs import excess_graph, redundancy_graph


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
