"""Local axis: how much signal a channel carries and how much of it its peers carry too. Sums in, numbers out.

Source: the two-axis paper, Eqs. 1, 2 and 7, appendix A; conventions in `Protocol`.
"""

import torch
from torch import Tensor

from lit_prune.measurement.moments import Moments

CORRELATION_LIMIT = 1 - 1e-6  # |ρ| is clipped here, so that a duplicate has a finite information of 6.6 nats
DEAD_VARIANCE_RATIO = 1e-10


def gaussian_information(correlation: Tensor) -> Tensor:
    """Mutual information g(ρ) = -½·log(1-ρ²) of two Gaussian variables in nats, |ρ| clipped to 1-1e-6; NaN stays."""
    return -0.5 * torch.log1p(-correlation.clamp(-CORRELATION_LIMIT, CORRELATION_LIMIT).square())


def correlation_matrix(covariances: Tensor) -> Tensor:
    """Correlations [N, N] of a covariance; NaN where a variance is not positive."""
    variance = covariances.diagonal()
    deviation = torch.where(variance > 0, variance, torch.nan).sqrt()
    return covariances / deviation / deviation[:, None]


def signal_power(outputs: Moments) -> Tensor:
    """Signal power s_i = w_iᵀ Σ_X w_i [N]: the population variance of the raw output over images and positions.

    The two are identical, bias and grouped convolution included, so no input patch is looked at.
    """
    return outputs.variances().clamp_min(0)


def dead_channels(power: Tensor) -> Tensor:
    """Boolean [N]: variance s at most 1e-10 of the median of the layer's positive variances."""
    return power <= DEAD_VARIANCE_RATIO * noise_floor(power).nan_to_num(0.0)


def noise_floor(power: Tensor) -> Tensor:
    """Noise floor σ0² [], the median of the positive s_i (the mean of the middle two); NaN if none is positive."""
    positive = power[power > 0]
    return torch.quantile(positive, 0.5) if len(positive) else power.new_tensor(torch.nan)


def rayleigh_quotient(power: Tensor, weight_norm: Tensor) -> Tensor:
    """RQ_i = s_i/‖w_i‖² [N]; NaN for a kernel of zeros."""
    return torch.where(weight_norm > 0, power / weight_norm.square(), torch.nan)


def input_capture(power: Tensor) -> Tensor:
    """Input capture I_X(i) = ½·log(1 + s_i/σ0²) in nats [N], ≥ 0; NaN if the whole layer is constant."""
    return 0.5 * torch.log1p(power / noise_floor(power))


def peer_overlap(correlations: Tensor, dead: Tensor, over: str = "peers") -> Tensor:
    """Peer overlap R̄_X(i) = mean over live j≠i of g(ρ_ij), nats [N]; NaN for dead channels and a lone live one.

    Args:
        correlations: ρ [N, N] over images and positions.
        dead: boolean [N].
        over: divide by the number of live `peers`, or of live `channels` (one more).
    """
    live = int((~dead).sum())
    shared = gaussian_information(correlations.masked_fill(dead, 0.0).fill_diagonal_(0.0)).sum(1)
    overlap = shared / (live - (over == "peers") if live > 1 else torch.nan)
    return overlap.masked_fill(dead, torch.nan)
