"""Sums of one layer: the same whatever the batches, around whatever shift."""

import torch

from lit_prune.measurement.moments import LayerSums


def test_batches_add_up_to_the_sums_of_all_samples():
    samples = torch.randn(500, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sums = LayerSums.zeros(torch.zeros(30))
    for part in samples.split(90):
        sums.add(part, part[::2])
    pooled = torch.cat([part[::2] for part in samples.split(90)])
    torch.testing.assert_close(sums.second, samples.T @ samples, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(sums.pooled_second, pooled.T @ pooled, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(sums.first, samples.sum(0))
    torch.testing.assert_close(sums.pooled_first, pooled.sum(0))
    assert (sums.samples, sums.images) == (500, len(pooled))


def test_empty_sums_are_neutral():
    samples = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sums = LayerSums.zeros(torch.zeros(6))
    sums.add(samples, samples)
    for added in (sums + LayerSums.zeros(torch.ones(6)), LayerSums.zeros(torch.ones(6)) + sums):
        for key, value in added.reshift(sums.shift).state().items():
            torch.testing.assert_close(value, sums.state()[key], rtol=1e-10, atol=1e-10)
