"""The `cmr_affine` score of one reader's input channels: the risk left when other channels stand in for one."""

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.replace.risk import RiskRows, weighted_affine
from lit_prune.replace.stand_ins import PARENT_RULES, parent_strength


def affine_risks(
    rows: RiskRows, weight: Tensor, parents: float = 16, ridge: float = 1e-4, rule: str = "pearson", seed: int = 0
) -> Tensor:
    """Second-order rise of the loss when each channel alone becomes an affine function of the others, [C], nats.

    min over θ of the mean over images of Σ_p g_p(Φθ - a)_p + ½ h_p (Φθ - a)_p², Φ a constant and the parents' values.
    The parents are the channels that fit best; which of them stay is not known yet. Invariant to rescaling a channel
    where the reader undoes it.

    Args:
        rows: values a, gradients g and curvature h at the reader's input.
        weight: of the reader, [O, C, *taps].
        parents: r, at most all others.
        ridge: as in `weighted_affine`.
        rule: who the parents are, see `parent_strength`.
        seed: of random parents.

    Raises:
        InputError: an unknown rule, parents that are no whole number of at least 0, a negative ridge, fewer rows than
            parents.

    Source: causal mechanism reduction, affine case of theorem 1.
    """
    if rule not in PARENT_RULES:
        raise InputError(f"score: cmr_affine has no parent rule {rule!r}; use one of {', '.join(PARENT_RULES)}")
    if parents < 0 or parents != int(parents) or ridge < 0:
        raise InputError(f"score: cmr_affine({parents:g}, {ridge:g}): parents is a whole number, neither below 0")
    channels = rows.values.shape[1]
    covariance = torch.cov(rows.values.T, correction=0).reshape(channels, channels)
    strength = parent_strength(covariance, weight, rule, seed).fill_diagonal_(-1)
    chosen = strength.topk(min(int(parents), channels - 1), dim=1).indices
    return weighted_affine(rows, range(channels), chosen, ridge).risk
