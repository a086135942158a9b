"""The short repair: its steps, what it lessens, what it leaves alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_prune.replace.distil import Distilling, distil
from lit_prune.replace.together import step_units
from lit_prune.task import Classification, Segmentation, settle


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).double().eval()


def damaged(original: nn.Module) -> nn.Module:
    """The network with less of what five of its units gave."""
    small = copy.deepcopy(original)
    with torch.no_grad():
        small[2].weight[:, :5] *= 0.1
    return small


def batches(count: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(32, 6, dtype=torch.float64) for _ in range(count)]


def repaired(original: nn.Module, small: nn.Module, **settings) -> dict:
    task, images = settle(None, original, batches())
    return distil(original, small, images, task, Distilling(epochs=4, **settings))


def test_units_that_are_rescaled_and_undone_are_repaired_alike():
    original = network()
    plain, scaled = damaged(original), damaged(original)
    factors = torch.logspace(-2, 2, 16, dtype=torch.float64)
    with torch.no_grad():
        scaled[0].weight *= factors[:, None]
        scaled[0].bias *= factors
        scaled[2].weight /= factors
    found = [repaired(original, small, learning_rate=0.03) for small in (plain, scaled)]
    assert found[0]["divergence_after"] < 0.8 * found[0]["divergence_before"]
    assert found[0]["divergence_after"] == pytest.approx(found[1]["divergence_after"], rel=1e-6)
    fresh = torch.randn(50, 6, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(plain(fresh), scaled(fresh), rtol=1e-5, atol=1e-7)


def test_parameters_that_need_no_gradient_and_running_statistics_stay():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double().eval()
    small = damaged(nn.Sequential(original[0], original[1], original[2]))
    small[0].requires_grad_(False)
    before = copy.deepcopy(small.state_dict())
    repaired(original, small)
    after = small.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"1.weight", "1.bias", "2.weight", "2.bias"}


def test_a_rate_that_ruins_the_network_leaves_it_as_it_was():
    original = network()
    small = damaged(original)
    before = copy.deepcopy(small.state_dict())
    found = repaired(original, small, learning_rate=1e4)
    assert found["divergence_after"] == found["divergence_before"]
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def test_a_weight_on_an_input_that_hardly_varies_about_a_large_mean_moves_by_that_mean():
    """W u with u = 5 + noise: a step of one unit moves the output by its spread, not by 5 / noise times as much."""
    torch.manual_seed(0)
    layer = nn.Linear(2, 4).double()
    inputs = torch.randn(1000, 2, dtype=torch.float64)
    inputs[:, 1] = 5 + 1e-3 * inputs[:, 1]
    unit = step_units(layer, lambda: layer(inputs))["weight"]
    with torch.no_grad():
        spread = layer(inputs).std(0, correction=0)
    rms = inputs.square().mean(0).sqrt()
    assert torch.allclose(unit, spread[:, None] / rms / 2**0.5, rtol=1e-9)


def test_what_a_shut_off_channel_reads_moves_as_little_as_it_gives():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3).double()
    with torch.no_grad():
        layer.weight[2] *= 1e-6
    images = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    unit = step_units(layer, lambda: layer(images))["weight"].amax((1, 2, 3))
    assert float(unit[2] / unit[0]) < 1e-5


def test_segmentation_lessens_the_divergence_of_its_decisions():
    torch.manual_seed(0)
    first, second = torch.randn(2, 4, 5, 3, 6, dtype=torch.float64)
    task = Segmentation()
    found = task.divergence(first, second)
    oracle = [
        F.kl_div(b.log_softmax(0), a.softmax(0), reduction="sum") / 18 for a, b in zip(first, second, strict=True)
    ]
    assert torch.allclose(found, torch.stack(oracle))
    assert torch.allclose(task.divergence(first, first + 3), torch.zeros(4, dtype=torch.float64), atol=1e-12)


def test_other_tasks_lessen_the_squared_change():
    first, second = torch.randn(2, 7, 3, dtype=torch.float64)
    assert torch.equal(Classification().divergence(first, second), (second - first).square().sum(1))


class Picky(nn.Module):
    """Its second layer gets no samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(3, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answers = self.first(images)
        self.second(answers[answers[:, 0] > 1e9])
        return answers


def test_a_layer_that_gets_no_samples_stays_as_it_is():
    torch.manual_seed(0)
    original = Picky().double().eval()
    small = copy.deepcopy(original)
    with torch.no_grad():
        small.first.weight *= 0.9
    found = repaired(original, small)
    assert found["divergence_after"] < found["divergence_before"]
    assert torch.equal(small.second.weight, original.second.weight)


def test_maps_without_a_batch_have_units_of_their_channels():
    torch.manual_seed(0)
    layer, image = nn.Conv2d(3, 4, 3), torch.randn(3, 9, 11)
    one, few = (step_units(layer, lambda given=given: layer(given))["weight"] for given in (image, image[None]))
    assert torch.allclose(one, few)
