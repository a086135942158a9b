"""Peer replacement: a channel's affine reconstruction from the peers most correlated with it. Sums in, numbers out.

Source: the two-axis paper, appendix K.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.lab.lesion.variants import Variants
from lit_prune.measurement import local_axis
from lit_prune.measurement.sums import LayerSums


@dataclass(frozen=True)
class PeerFit:
    """Reconstruction y_i ≈ Σ_p weights[i, p]·y_p + bias[i] of every channel of a layer, float64.

    A dead channel, or one without live peers, is given its mean: no weights, `r2` NaN.

    Attributes:
        weights: [N, N], zero outside the peers.
        bias: [N].
        r2: share of the channel's variance that is explained on the calibration images, at most 1, [N].
    """

    weights: Tensor
    bias: Tensor
    r2: Tensor

    def replacements(self, channels: Tensor) -> Variants:
        """The variants in which each of `channels` has its reconstruction."""
        return Variants(channels, self.weights[channels], self.bias[channels])


def fit_peers(sums: LayerSums, peers: int = 8, ridge: float = 1e-6) -> PeerFit:
    """Ridge regression of every channel on its peers, all channels at once, from the second moments alone.

    P(i) are the `peers` live channels of largest |ρ_ij|. On standardised outputs β = (Σ_PP + ridge·I)⁻¹ ρ_Pi, so
    weights = β·σ_i/σ_p, bias = μ_i - weights·μ_P, and R² = 2 βᵀρ_Pi - βᵀ Σ_PP β.

    Args:
        sums: of the layer, over images and positions.
        peers: number of peers, ≥ 1; fewer where the layer has fewer.
        ridge: penalty relative to the peers' variances, above 0.

    Raises:
        InputError: no more images than coefficients.
    """
    if sums.pooled.count < peers + 2:
        raise InputError(
            f"limit: {sums.pooled.count} calibration images are too few for {peers} peers; give at least {peers + 2},"
            " better 1000"
        )
    covariance, mean = sums.outputs.covariance(), sums.outputs.mean()
    dead = local_axis.dead_channels(covariance.diagonal().clamp_min(0))
    live = (~dead).nonzero().flatten()
    weights = torch.zeros_like(covariance)
    r2 = torch.full_like(mean, torch.nan)
    count = min(peers, len(live) - 1)
    if count > 0:
        correlations = local_axis.correlation_matrix(covariance)[live][:, live]
        beta, chosen, explained = _standardised_fit(correlations, count, ridge)
        scale = covariance.diagonal()[live].sqrt()
        weights[live[:, None], live[chosen]] = beta * scale[:, None] / scale[chosen]
        r2[live] = explained
    return PeerFit(weights, mean - weights @ mean, r2)


def _standardised_fit(correlations: Tensor, count: int, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [n, count], the peers they belong to, and R² [n]."""
    strength = correlations.abs().fill_diagonal_(-1)
    chosen = strength.topk(count, dim=1).indices
    between = correlations[chosen[:, :, None], chosen[:, None, :]]  # [n, count, count]
    target = correlations.gather(1, chosen)
    beta = torch.linalg.solve(between + ridge * torch.eye(count).to(between), target)
    fitted = (between @ beta[:, :, None])[:, :, 0]
    return beta, chosen, (beta * (2 * target - fitted)).sum(1)
