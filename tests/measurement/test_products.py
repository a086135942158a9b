"""Sums of products on their way into float64: those of all rows at once, whatever the batches and the width."""

import pytest
import torch
from oracles import largest_error

from lit_prune.measurement.products import CHUNK, SymmetricSum, transformed


@pytest.mark.parametrize("channels", [1, 3, 40, 96, 557])
def test_pending_products_add_up_to_those_of_all_rows(channels):
    generator = torch.Generator().manual_seed(0)
    sizes = [7, 1000, CHUNK // 2, CHUNK // 2 + 300, 5]
    batches = [torch.randn(size, channels, generator=generator) + 0.1 for size in sizes]
    products = SymmetricSum()
    taken = []
    for number, rows in enumerate(batches):
        products.add(rows)
        if number == 1:
            taken.append(products.take())  # what is taken is not counted again
    taken.append(products.take())
    assert products.take() is None
    rows = torch.cat(batches).double()
    found = taken[0] + taken[1]
    assert largest_error(found, rows.T @ rows) < 1e-6
    torch.testing.assert_close(found, found.T, rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("channels", [3, 40, 101])
def test_lanes_of_rows_add_up_to_all_of_them_whatever_their_number(channels):
    generator = torch.Generator().manual_seed(3)
    batches = [
        torch.randn(*shape, channels, generator=generator)
        for shape in [(2, 700), (2, 9000), (3, 500), (1, 8000), (3, 8), (1, 40), (11,)]
    ]
    batches += [torch.randn(4, channels, 50, generator=generator).transpose(1, 2)]  # channels first
    products = SymmetricSum()
    for rows in batches:
        products.add(rows)
    rows = torch.cat([rows.reshape(-1, channels) for rows in batches]).double()
    assert largest_error(products.take(), rows.T @ rows) < 1e-6


def test_a_long_sum_is_as_exact_as_its_first_chunk():
    chunk, batches = 16, torch.rand(160, 100, 64, generator=torch.Generator().manual_seed(4)) + 0.5

    def error(products, rows):
        """Root mean square of the relative errors."""
        for part in rows:
            products.add(part)
        exact = rows.flatten(0, 1).double()
        exact = exact.T @ exact
        return (products.take() / exact - 1).square().mean().sqrt()

    first = error(SymmetricSum(chunk), batches[:1, :chunk])
    assert error(SymmetricSum(chunk), batches) < first / 2
    assert error(SymmetricSum(), batches) > first  # in chunks of half the rows


def test_float64_rows_lose_nothing():
    rows = torch.randn(500, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    products = SymmetricSum()
    for part in rows.split(90):
        products.add(part)
    torch.testing.assert_close(products.take(), rows.T @ rows, rtol=1e-12, atol=1e-10)


def test_the_transformed_matrix_is_the_double_product():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(195, 20, generator=generator, dtype=torch.float64)
    rows = torch.randn(20, 50, generator=generator, dtype=torch.float64)
    weight[5] = 0.0
    found, expected = transformed(weight, rows @ rows.T), weight @ rows @ rows.T @ weight.T
    assert (found - expected).abs().max() < 1e-12 * expected.diagonal().max()
    assert not found[5].any() and not found[:, 5].any()
