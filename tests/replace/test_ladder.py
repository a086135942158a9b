import copy

import pytest
import torch
from torch import nn

from lit_prune.replace.ladder import Cut, distortion_ladders, ladder_widths, measured_distortion
from lit_prune.replace.reconstruction import reader_moments, reconstruction_costs
from lit_prune.replace.regression import Covariance
from lit_prune.structure import trace_groups


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1, stride=2)
        self.act1, self.act2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.linear = nn.Linear(5, 4)

    def forward(self, images):
        return self.linear(self.act2(self.conv2(self.act1(self.conv1(images)))).mean((2, 3)))


@pytest.fixture
def chain():
    torch.manual_seed(0)
    return Chain().double().eval()


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [(torch.randn(40, 3, 8, 8, dtype=torch.float64), torch.randint(4, (40,))) for _ in range(2)]


def moments_of(model, batches):
    return reader_moments(model, ["conv2", "linear"], batches)


def test_nested_cuts_are_the_least_squares_fits_on_the_kept_columns():
    torch.manual_seed(2)
    rows = torch.randn(500, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64) + 1.0
    weight = torch.randn(3, 8, dtype=torch.float64)
    targets = rows @ weight.T
    centred, mean = rows - rows.mean(0), rows.mean(0)
    variance = centred.square().mean(0)
    covariance = Covariance(
        mean, targets.mean(0), centred.T @ centred / 500, centred.T @ targets / 500, targets.var(0), variance
    )
    columns = torch.tensor([[0, 1], [4, 5], [6, 7]])  # columns 2 and 3 belong to nobody
    cut = Cut.build(weight, covariance, columns, [2, 0, 1], [1, 2], 1e-4)
    for place, kept in enumerate(([2, 3, 6, 7], [0, 1, 2, 3, 6, 7])):
        inner = Covariance(
            mean[kept],
            targets.mean(0),
            covariance.inputs[kept][:, kept],
            covariance.cross[kept],
            covariance.targets,
            variance[kept],
        )
        fit = inner.solve(1e-4, weight[:, kept])
        change = -weight.clone()
        change[:, kept] += fit.weight
        torch.testing.assert_close(cut.weight[place], change.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cut.bias[place], fit.bias.float(), rtol=1e-4, atol=1e-4)


def test_distortion_is_what_a_small_change_does_to_the_prediction(chain, batches):
    """With a probe in every direction the expected square is the squared change itself, to first order."""
    torch.manual_seed(3)
    change = Cut(1e-5 * torch.randn(1, 5, 54), 1e-5 * torch.randn(1, 5))
    moved = copy.deepcopy(chain)
    with torch.no_grad():
        moved.conv2.weight += change.weight[0].reshape(5, 6, 3, 3)
        moved.conv2.bias += change.bias[0]
        images = torch.cat([images for images, _ in batches])
        expected = (moved(images) - chain(images)).square().sum(1).mean()
    found = [float(measured_distortion(chain, batches, {"g": {"conv2": change}}, seed=seed)["g"]) for seed in range(60)]
    assert sum(found) / 60 == pytest.approx(float(expected), rel=0.15)


def test_frozen_networks_are_measured_and_left_alone(chain, batches):
    chain.requires_grad_(False)
    before = copy.deepcopy(chain.state_dict())
    measured_distortion(chain, batches, {"g": {"conv2": Cut(torch.ones(1, 5, 54), torch.ones(1, 5))}})
    assert all(torch.equal(value, before[name]) for name, value in chain.state_dict().items())
    assert not any(parameter.requires_grad for parameter in chain.parameters())


def test_wider_is_better_and_dense_costs_nothing(chain, batches):
    graph = trace_groups(chain, batches[0][0])
    costs = reconstruction_costs(chain, batches, batches[0][0], per_mac=0)
    found = distortion_ladders(chain, graph, {"conv1": costs["conv1"]}, batches, moments_of(chain, batches))
    widths, errors = found["conv1"]
    assert widths == ladder_widths(6) == [1, 2, 3, 4, 5, 6]
    assert errors[-1] == 0 and errors[0] > errors[2] > errors[4]


def test_order_and_ladder_survive_a_rescaling_of_units(chain, batches):
    """Units times factors in [0.01, 100], undone by their reader: same function, same order, same distortion."""
    scaled = copy.deepcopy(chain)
    factors = torch.exp(torch.empty(6, dtype=torch.float64).uniform_(-4.6, 4.6))
    with torch.no_grad():
        scaled.conv1.weight *= factors.view(-1, 1, 1, 1)
        scaled.conv1.bias *= factors
        scaled.conv2.weight /= factors.view(1, -1, 1, 1)
    graph = trace_groups(chain, batches[0][0])
    found = []
    for model in (chain, scaled):
        costs = reconstruction_costs(model, batches, batches[0][0], per_mac=0)["conv1"]
        ladders = distortion_ladders(model, graph, {"conv1": costs}, batches, moments_of(model, batches))
        found.append((costs.argsort().tolist(), ladders["conv1"][1]))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)


def test_both_calls_of_a_layer_count(chain, batches):
    """A layer that runs twice on the same values moves the prediction as two equal layers would."""
    torch.manual_seed(4)
    same, cut = nn.Linear(3, 3, bias=False).double(), Cut(torch.randn(1, 3, 3), torch.zeros(1, 3))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = same, copy.deepcopy(same), copy.deepcopy(same)

        def forward(self, x):
            return self.a(x) + self.a(x)

    class Apart(Twice):
        def forward(self, x):
            return self.b(x) + self.c(x)

    values = [torch.randn(50, 3, dtype=torch.float64)]
    once = measured_distortion(Twice(), values, {"g": {"a": cut}}, "unlabelled")["g"]
    apart = measured_distortion(Apart(), values, {"g": {"b": cut, "c": cut}}, "unlabelled")["g"]
    torch.testing.assert_close(once, apart)
