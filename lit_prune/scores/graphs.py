"""Channel graphs of a layer and how modular they are: redundancy graph R and target-excess graph S.

Source: the two-axis paper, appendices A and K.1; Clauset, Newman and Moore 2004 for the greedy partition.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.measurement.local_axis import gaussian_information
from lit_prune.measurement.target_axis import pair_excess

EDGE_RATIO = 0.1


@dataclass(frozen=True)
class Partition:
    """Communities of a weighted graph.

    Attributes:
        modularity: Q, in [-½, 1); NaN for a graph without edges.
        communities: int64 [N], community of each node, 0 for the largest; a node without edges is its own.
    """

    modularity: float
    communities: Tensor


def redundancy_graph(correlations: Tensor) -> Tensor:
    """Edge weights R_ij = g(ρ_ij) in nats [N, N], diagonal 0; NaN for dead channels.

    Args:
        correlations: ρ [N, N] over images and positions.
    """
    return gaussian_information(correlations).fill_diagonal_(0)


def excess_graph(task: Tensor, between: Tensor) -> Tensor:
    """Edge weights S_ij = I(T;[Y_i,Y_j]) - max(I_T(i), I_T(j)) in nats [N, N], diagonal 0; NaN for dead channels.

    Args:
        task: correlations with T, [N].
        between: correlations of the pooled outputs, [N, N].
    """
    return pair_excess(task[:, None], task[None], between).fill_diagonal_(0)


def heaviest_edges(weights: Tensor, ratio: float = EDGE_RATIO) -> Tensor:
    """The graph [N, N] of the heaviest edges: ⌈ratio·(number of positive edges)⌉ of them kept, all others 0.

    Args:
        weights: symmetric [N, N]; the diagonal is ignored, NaN is no edge.
        ratio: share of the positive edges to keep, in (0, 1].

    Raises:
        InputError: not a square matrix, or a ratio out of range.
    """
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
        raise InputError(f"weights: shape {tuple(weights.shape)}; give a square matrix [N, N]")
    if not 0 < ratio <= 1:
        raise InputError(f"ratio: {ratio} is not in (0, 1]; give the share of edges to keep")
    upper = weights.double().nan_to_num(0.0).triu(1)
    kept = torch.zeros_like(upper)
    count = math.ceil(ratio * int((upper > 0).sum()))
    places = upper.flatten().topk(count).indices
    kept.view(-1)[places] = upper.flatten()[places]
    return kept + kept.T


def greedy_modularity(weights: Tensor, ratio: float = EDGE_RATIO) -> Partition:
    """Greedy Newman (CNM) partition of the graph's heaviest edges and its modularity.

    Q = Σ_c (e_cc - a_c²), e_cc the share of the edge weight inside community c, a_c the share of the degrees. From
    single nodes, the pair of adjacent communities with the largest ΔQ = 2·(e_cd - a_c·a_d) is joined until none is
    positive. The same partition as `networkx.community.greedy_modularity_communities`, without its heaps: dense
    matrices, a row of them new for each join.

    Args:
        weights: symmetric edge weights [N, N], for instance `redundancy_graph(...)`.
        ratio: share of the positive edges to keep.

    Raises:
        InputError: see `heaviest_edges`.
    """
    graph = heaviest_edges(weights, ratio)
    total = float(graph.sum())
    if total == 0:
        return Partition(math.nan, torch.arange(len(graph)))
    shares = (graph / total).numpy()
    labels = _join(shares)
    member = np.equal.outer(np.unique(labels), labels).astype(float)  # [communities, N]
    inside = np.einsum("ci,ij,cj->c", member, shares, member, optimize=True)
    degrees = member @ shares.sum(1)
    largest_first = np.argsort(np.argsort(-member.sum(1), kind="stable"), kind="stable")
    communities = largest_first[np.unique(labels, return_inverse=True)[1]]
    return Partition(float((inside - degrees**2).sum()), torch.from_numpy(communities))


def _join(shares: np.ndarray) -> np.ndarray:
    """Greedy communities, each named by one of its nodes, [N]; weight inside a community decides nothing."""
    labels, between, degrees = np.arange(len(shares)), shares.copy(), shares.sum(1)
    gains = np.where(between > 0, between - np.outer(degrees, degrees), -np.inf)  # ΔQ / 2 of each pair
    while gains.flat[best := gains.argmax()] > 0:
        kept, gone = divmod(best, len(gains))
        labels[labels == gone] = kept
        row = between[kept] + between[gone]
        row[[kept, gone]] = 0
        between[kept] = between[:, kept] = row
        between[gone] = between[:, gone] = 0
        degrees[kept] += degrees[gone]
        gains[kept] = gains[:, kept] = np.where(row > 0, row - degrees * degrees[kept], -np.inf)
        gains[gone] = gains[:, gone] = -np.inf
    return labels
