import math

import pytest
import torch

from lit_prune.measurement import local_axis
from lit_prune.measurement.moments import Moments


def sums_of(values):
    """Moments of samples [n, N]."""
    moments = Moments(values[0])
    moments.add(values[:, None])
    return moments


def correlated(covariance, count=400):
    """Samples [count, N] float64 whose population covariance is exactly `covariance`."""
    noise = torch.randn(count, len(covariance), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = noise - noise.mean(0)
    whitened = noise @ torch.linalg.inv(torch.linalg.cholesky(noise.T @ noise / count)).T
    return whitened @ torch.linalg.cholesky(torch.as_tensor(covariance, dtype=torch.float64)).T


def columns(values):
    sums = sums_of(values)
    power = local_axis.signal_power(sums)
    dead = local_axis.dead_channels(power)
    correlations = local_axis.correlation_matrix(sums.covariance())
    return power, dead, correlations


@pytest.mark.parametrize("rho", [0.0, 0.3, -0.3, 0.9, -0.99])
def test_overlap_of_a_gaussian_pair_is_its_mutual_information(rho):
    power, dead, correlations = columns(correlated([[4.0, 2 * rho], [2 * rho, 1.0]]))
    torch.testing.assert_close(power, torch.tensor([4.0, 1.0], dtype=torch.float64))
    overlap = local_axis.peer_overlap(correlations, dead)
    expected = -0.5 * math.log(1 - rho**2)
    torch.testing.assert_close(overlap, torch.full((2,), expected, dtype=torch.float64), atol=1e-12, rtol=1e-9)


def test_a_duplicate_has_the_largest_finite_overlap():
    base = correlated(torch.eye(2).double())
    values = torch.cat([base, -3 * base[:, :1]], dim=1)
    _, dead, correlations = columns(values)
    limit = -0.5 * math.log(1 - (1 - 1e-6) ** 2)
    overlap = local_axis.peer_overlap(correlations, dead)
    torch.testing.assert_close(
        overlap, torch.tensor([limit / 2, 0.0, limit / 2], dtype=torch.float64), atol=1e-9, rtol=1e-9
    )


def test_input_capture_is_half_log_two_at_the_noise_floor_and_keeps_its_ranks_under_scaling():
    power = torch.tensor([0.0, 1.0, 2.0, 8.0], dtype=torch.float64)
    assert float(local_axis.noise_floor(power)) == 2.0  # the zero does not count
    capture = local_axis.input_capture(power)
    torch.testing.assert_close(capture, 0.5 * torch.log1p(power / 2))
    torch.testing.assert_close(local_axis.input_capture(7 * power), capture)
    one_scaled = power.clone()
    one_scaled[1] *= 3  # the order changes with the signal, not with the floor
    assert local_axis.input_capture(one_scaled).argsort().tolist() == one_scaled.argsort().tolist()


def test_noise_floor_of_an_even_number_is_the_mean_of_the_middle_two():
    assert float(local_axis.noise_floor(torch.tensor([1.0, 2.0, 4.0, 10.0]))) == 3.0


def test_rayleigh_quotient_does_not_see_the_kernel_norm():
    power, norm = torch.tensor([2.0, 5.0]), torch.tensor([1.0, 0.0])
    quotient = local_axis.rayleigh_quotient(power, norm)
    assert float(quotient[0]) == 2.0
    assert quotient[1].isnan()
    scaled = local_axis.rayleigh_quotient(power * 9, norm * 3)
    assert float(scaled[0]) == 2.0


def test_dead_channels_are_nobodys_peers():
    base = correlated(torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double())
    noise = 1e-6 * torch.randn(len(base), 1, dtype=torch.float64)
    with_dead = torch.cat([base[:, :1], noise, torch.ones(len(base), 1).double(), base[:, 1:]], dim=1)
    power, dead, correlations = columns(with_dead)
    assert dead.tolist() == [False, True, True, False]
    overlap = local_axis.peer_overlap(correlations, dead)
    assert overlap.isnan().tolist() == dead.tolist()
    alone = columns(base)
    torch.testing.assert_close(overlap[~dead], local_axis.peer_overlap(alone[2], alone[1]))
    assert float(local_axis.input_capture(power)[2]) == 0.0


def test_a_layer_that_is_dead_but_for_one_channel_or_wholly_has_no_overlap():
    values = torch.ones(10, 3, dtype=torch.float64)
    power, dead, correlations = columns(values)
    assert dead.all()
    assert local_axis.peer_overlap(correlations, dead).isnan().all()
    assert local_axis.input_capture(power).isnan().all()
    values[:, 1] = torch.arange(10)
    _, dead, correlations = columns(values)
    assert dead.tolist() == [True, False, True]
    assert local_axis.peer_overlap(correlations, dead).isnan().all()


def test_overlap_over_channels_is_the_mean_with_itself_as_zero():
    _, dead, correlations = columns(correlated(0.5 * torch.eye(4).double() + 0.5))
    peers = local_axis.peer_overlap(correlations, dead)
    torch.testing.assert_close(local_axis.peer_overlap(correlations, dead, "channels"), peers * 3 / 4)
