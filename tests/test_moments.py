"""Sums on their way into float64: the whole is that of all samples at once, whatever the batches and the width."""

import pytest
import torch

from lit_prune.moments import CHUNK, WIDE, Accumulator, LayerSums


@pytest.mark.parametrize("channels", [3, 40, WIDE, 2 * WIDE + 77])
def test_pending_products_add_up_to_those_of_all_samples(channels):
    generator = torch.Generator().manual_seed(0)
    sizes = [7, 1000, CHUNK // 2, CHUNK // 2 + 300, 5]
    batches = [torch.randn(size, channels, generator=generator) + 0.1 for size in sizes]
    sums = LayerSums.zeros(torch.zeros(channels))
    accumulator = Accumulator(sums)
    for number, samples in enumerate(batches):
        accumulator.add(samples, samples[:4])
        if number == 1:
            accumulator.flush()  # reading in between changes nothing
    accumulator.flush()
    accumulator.flush()
    samples, pooled = torch.cat(batches).double(), torch.cat([part[:4] for part in batches]).double()
    scale = samples.square().sum(0).sqrt()
    assert float(((sums.second - samples.T @ samples) / torch.outer(scale, scale)).abs().max()) < 1e-6
    torch.testing.assert_close(sums.pooled_second, pooled.T @ pooled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.first, samples.sum(0), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(sums.second, sums.second.T, rtol=1e-6, atol=1e-2)
    assert (sums.samples, sums.images) == (len(samples), len(pooled))


def test_float64_samples_lose_nothing():
    samples = torch.randn(500, WIDE + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sums = LayerSums.zeros(torch.zeros(WIDE + 1))
    for part in samples.split(90):
        sums.add(part, part)
    torch.testing.assert_close(sums.second, samples.T @ samples, rtol=1e-12, atol=1e-10)
