"""Comparisons with float64 that several tests share."""

import torch
from torch import Tensor

from lit_prune.measurement import local_axis
from lit_prune.measurement.moments import LayerSums


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two covariances [N, N] or sums of products, as a share of the expected deviations."""
    scale = expected.diagonal().sqrt()
    return float(((found - expected) / torch.outer(scale, scale)).abs().max())


def assert_moments(sums: LayerSums, samples: Tensor, pooled: Tensor, tolerance: float = 1e-6) -> None:
    """The sums hold means and covariances of samples [S, N] and of pooled outputs [B, N], both float64."""
    joint = sums.samples, sums.first, sums.second
    means = sums.images, sums.pooled_first, sums.pooled_second
    for (count, first, second), values in [(joint, samples), (means, pooled)]:
        expected = torch.cov(values.T, correction=0)
        assert int(count) == len(values)
        assert largest_error(local_axis.covariance(count, first, second), expected) < tolerance
        distance = sums.shift + first / count - values.mean(0)
        assert float((distance.abs() / samples.std(0)).max()) < tolerance
