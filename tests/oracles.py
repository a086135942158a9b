"""Comparisons with float64 that several tests share."""

import torch
from torch import Tensor

from lit_prune.measurement.sums import LayerSums


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two covariances [N, N] or sums of products, as a share of the expected deviations."""
    scale = expected.diagonal().sqrt()
    return float(((found - expected) / torch.outer(scale, scale)).abs().max())


def assert_moments(sums: LayerSums, samples: Tensor, pooled: Tensor, tolerance: float = 1e-6) -> None:
    """The sums hold means and covariances of samples [S, N] and of pooled outputs [B, N], both float64."""
    for moments, values in [(sums.outputs, samples), (sums.pooled, pooled)]:
        assert moments.count == len(values)
        assert largest_error(moments.covariance(), torch.cov(values.T, correction=0)) < tolerance
        distance = moments.mean() - values.mean(0)
        assert float((distance.abs() / samples.std(0)).max()) < tolerance
