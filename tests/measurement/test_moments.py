"""Moments: those of all samples at once, whatever the batches, the memory order, the width and the shift."""

import pytest
import torch
from oracles import largest_error

from lit_prune.measurement import moments as module
from lit_prune.measurement.moments import CHUNK, Moments


def rows(count, channels, dtype=torch.float64, seed=1):
    return torch.randn(count, channels, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 3, 40, 96, 257])
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 1 << 21])
def test_float32_sums_agree_with_float64(channels, channels_first, block_bytes, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    sizes = [(7, 1), (30, 36), (3, CHUNK // 2 + 9), (1, 2 * CHUNK + 1)] if block_bytes > 1 else [(7, 1), (30, 36)]
    batches = [rows(images * positions, channels, torch.float32) + 50 for images, positions in sizes]
    batches = [batch.view(*size, channels) for batch, size in zip(batches, sizes, strict=True)]
    found = Moments.around(batches[0])
    for batch in batches:
        means = found.add(batch.mT.contiguous().mT if channels_first else batch)
        assert (means.double() + found.shift - batch.double().mean(1)).abs().max() < 1e-4
    values = torch.cat([batch.flatten(0, 1) for batch in batches]).double()
    assert found.count == len(values)
    assert largest_error(found.covariance(), torch.cov(values.T, correction=0).view(channels, channels)) < 1e-6
    torch.testing.assert_close(found.mean(), values.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(found.second, found.second.T, rtol=0, atol=0)


def test_float64_samples_lose_nothing_and_the_diagonal_alone_is_the_same():
    values = rows(500, 97)
    whole, diagonal = Moments(torch.zeros(97).double()), Moments(torch.zeros(97).double(), diagonal=True)
    for part in values.split(90):
        whole.add(part[:, None])
        diagonal.add_shifted(part)
    torch.testing.assert_close(whole.second, values.T @ values, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(diagonal.second, whole.second.diagonal(), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(diagonal.variances(), whole.variances(), rtol=1e-10, atol=1e-10)


def test_moments_around_different_shifts_add_and_are_mapped_exactly():
    values, weight, bias = rows(300, 20), rows(50, 20, seed=2), rows(50, 1, seed=3)[:, 0]
    parts = [Moments(shift) for shift in (values[0], values[1] + 3)]
    for part, some in zip(parts, values.split(150), strict=True):
        part.add(some[:, None])
    for total in (parts[0] + parts[1], parts[1] + parts[0], parts[0] + parts[1] + Moments(torch.ones(20).double())):
        torch.testing.assert_close(total.mean(), values.mean(0))
        torch.testing.assert_close(total.covariance(), torch.cov(values.T, correction=0))
    mapped, expected = (parts[0] + parts[1]).mapped(weight, bias), values @ weight.T + bias
    torch.testing.assert_close(mapped.mean(), expected.mean(0))
    torch.testing.assert_close(mapped.covariance(), torch.cov(expected.T, correction=0))


def test_a_copy_from_the_state_goes_on_where_the_first_was():
    values = rows(300, 20, torch.float32)
    first = Moments.around(values[:, None])
    first.add(values[:100, None])
    second = first.copy()
    for moments in (first, second):
        moments.add(values[100:, None])
    torch.testing.assert_close(first.covariance(), second.covariance(), rtol=1e-5, atol=1e-7)
    assert first.count == second.count == 300


def test_only_chosen_positions_are_samples_and_means_are_over_all():
    values = rows(12 * 9, 20, torch.float32).view(12, 9, 20)
    places = torch.tensor([[0, 4, 8]]).expand(12, -1)
    found = Moments.around(values)
    means = found.add(values, places)
    chosen = values[:, [0, 4, 8]].flatten(0, 1).double()
    torch.testing.assert_close(found.covariance(), torch.cov(chosen.T, correction=0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(means + found.shift.float(), values.mean(1))
