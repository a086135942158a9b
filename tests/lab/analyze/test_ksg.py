import math

import pytest
import torch

from lit_prune.errors import InputError
from lit_prune.lab.analyze.samples import ksg_information


def correlated(rho: float, count: int = 2000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, noise = torch.randn(2, count, generator=generator, dtype=torch.float64)
    return first, (rho * first + math.sqrt(1 - rho**2) * noise)[:, None]


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_gaussian_pair_has_its_closed_form(rho):
    estimate = float(ksg_information(*correlated(rho)))
    assert estimate == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.05)
    assert estimate >= 0


def test_a_dependence_without_correlation_is_seen():
    target, _ = correlated(0.0)
    assert float(ksg_information(target, target.square()[:, None])) > 1


def test_scale_and_company_of_a_channel_change_nothing():
    target, values = correlated(0.7, 500)
    constant = torch.full_like(values, 3.0)
    found = ksg_information(target, torch.cat([values, constant, 10 - 1000 * values], 1))
    assert float(found[0]) == pytest.approx(float(found[2]), abs=1e-4)
    assert math.isnan(found[1])


def test_bad_samples_are_refused():
    with pytest.raises(InputError, match="neighbours"):
        ksg_information(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(InputError, match="NaN"):
        ksg_information(torch.full((9,), torch.nan), torch.zeros(9, 1))
