import copy

import pytest
import torch
from torch import nn

from lit_prune.replace.stage_maps import Stage, find_stages


class Pyramid(nn.Module):
    """Two stages, the second at half the resolution; the stem runs twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(width, width, 1)
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, 6, 3, stride=2, padding=1), nn.ReLU())
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 2)

    def forward(self, images):
        return self.head(self.pool(self.second(self.stem(self.stem(self.first(images))))).flatten(1))


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(20, 3, 8, 8)


def test_stages_are_the_last_modules_of_each_size_that_run_once(images):
    torch.manual_seed(1)
    found = find_stages(Pyramid(8).eval(), Pyramid(5).eval(), lambda model: model(images))
    assert {name: tuple(stage.weight.shape) for name, stage in found.items()} == {"first": (5, 8), "second": (6, 6)}


def test_networks_without_maps_and_stages_with_few_positions_have_none(images):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    assert not find_stages(net, copy.deepcopy(net), lambda model: model(images))
    torch.manual_seed(1)
    wide = nn.Sequential(nn.Conv2d(3, 50, 8)).eval()  # 20 positions of 50 channels
    assert not find_stages(wide, copy.deepcopy(wide), lambda model: model(images))


def test_channels_that_are_combinations_of_the_kept_ones_cost_nothing():
    torch.manual_seed(2)
    found = torch.randn(30, 4, 6, 6)
    wanted = torch.einsum("bchw,cd->bdhw", found, torch.randn(4, 7)) + torch.randn(7, 1, 1)
    stage, other = Stage.solve(found, wanted), torch.randn(30, 4, 6, 6)
    assert float(stage.loss(found, wanted)) < 1e-5
    assert float(stage.loss(other, wanted)) > 1, "as far as the answers to other samples are"


def test_the_loss_does_not_change_when_channels_are_rescaled():
    torch.manual_seed(3)
    found, wanted = torch.randn(30, 4, 6, 6).double(), torch.randn(30, 7, 6, 6).double()
    factors = torch.logspace(-2, 2, 4, dtype=torch.float64).view(-1, 1, 1)
    one, other = Stage.solve(found, wanted), Stage.solve(factors * found, wanted)
    assert float(other.loss(factors * found, wanted)) == pytest.approx(float(one.loss(found, wanted)), rel=1e-4)
    assert float(one.loss(found, wanted)) == pytest.approx(1, abs=0.05), "noise is not explained"
