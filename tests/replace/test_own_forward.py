"""Layers of classes derived from torch's, with a forward of their own."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import nn

import lit_prune
from lit_prune.replace.kernels import is_solvable, spread


class Reflecting(nn.Conv2d):
    """Pads by reflection, itself."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.weight, self.bias)


class Scaled(nn.Linear):
    """The equalised learning rate of GANs."""

    def forward(self, x):
        return F.linear(x, self.weight / 8, self.bias)


class Rectified(nn.Conv2d):
    """Convolution and activation in one."""

    def forward(self, x):
        return super().forward(x).relu_()


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), self.weight, self.bias)


class Counting(nn.Linear):
    def __init__(self, *widths):
        super().__init__(*widths)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Styled(nn.Conv2d):
    def forward(self, x, style):
        return super().forward(x * style)


@pytest.mark.parametrize(
    "layer", [ScaledStdConv2d(4, 8, 3), Scaled(8, 8), Rectified(4, 8, 3), Cosine(8, 8), Styled(4, 8, 3)], ids=str
)
def test_what_is_another_map_than_that_of_its_weights_is_not_solved_for(layer):
    assert not is_solvable(layer)


@pytest.mark.parametrize("layer", [Reflecting(4, 8, 3), Conv2dSame(4, 8, 3, stride=2), Conv2dSame(4, 8, 2)], ids=str)
def test_what_a_convolution_pads_in_its_own_way_is_the_map_that_is_solved_for(layer):
    x = torch.randn(2, 4, 9, 10)
    plain = F.conv2d(spread(layer, x), layer.weight, layer.bias, layer.stride)
    assert is_solvable(layer)
    torch.testing.assert_close(plain, layer(x))


def test_a_layer_that_is_tried_is_left_as_it_was():
    layer = Counting(4, 8)
    assert is_solvable(layer) and not layer.calls


def stack(first: nn.Module, second: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(1024, 4))


def test_own_padding_is_solved_like_that_of_torch():
    torch.manual_seed(0)
    own, padding = stack(Reflecting(3, 16, 3), Reflecting(16, 16, 3)), {"padding": 1, "padding_mode": "reflect"}
    torchs = stack(nn.Conv2d(3, 16, 3, **padding), nn.Conv2d(16, 16, 3, **padding))
    torchs.load_state_dict(own.state_dict())
    batches = [torch.randn(32, 3, 8, 8)] * 2
    found = [lit_prune.compress(network, batches, keep=0.6)[1] for network in (own, torchs)]
    assert found[0]["plan"]["keep_channels"] == found[1]["plan"]["keep_channels"]
    assert found[0]["distortion"] == pytest.approx(found[1]["distortion"], rel=1e-3)


def test_weights_that_a_layer_scales_are_left_as_they_are():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), Scaled(32, 4))
    small, report = lit_prune.compress(network, [torch.randn(256, 12)], keep=0.6)
    assert "4" not in {name for name, found in report["layers"].items() if "ridge" in found}
    assert report["distortion"] < 0.5
