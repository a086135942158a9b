"""The `cmr_affine` score of one reader's input channels: the risk left when kept channels stand in for one."""

import torch
from torch import Tensor

from lit_prune.mechanisms.risk import RiskRows, weighted_affine
from lit_prune.mechanisms.stand_ins import correlations


def affine_risks(rows: RiskRows, parents: int = 16, ridge: float = 1e-4) -> Tensor:
    """Second-order rise of the loss when each channel alone becomes an affine function of the others, [C], nats.

    The parents are the channels best correlated with it (Pearson, absolute); which of them stay is not known yet.

    Args:
        rows: values, gradients and curvature at the reader's input.
        parents: how many, at most all others.
        ridge: as in `weighted_affine`.

    Raises:
        InputError: fewer rows than parents.

    Source: causal mechanism reduction, affine case of theorem 1.
    """
    channels = rows.values.shape[1]
    every = list(range(channels))
    strength = correlations(torch.cov(rows.values.T, correction=0).reshape(channels, channels), every, every)
    strength.fill_diagonal_(-1)
    chosen = strength.topk(min(parents, channels - 1), dim=1).indices
    return weighted_affine(rows, every, chosen, ridge).risk
