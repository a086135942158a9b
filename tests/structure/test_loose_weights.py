"""Weights that no layer holds leave channels whole, and the reason says whose they are and what to do."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lit_prune
from lit_prune.errors import InputError
from lit_prune.structure import trace_groups


class OwnConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)

    def forward(self, values: Tensor) -> Tensor:
        return F.conv2d(values, self.kernel, padding=1)


class OwnLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 8) / 8)

    def forward(self, values: Tensor) -> Tensor:
        return F.linear(values.movedim(1, -1), self.matrix).movedim(-1, 1)


class Made(OwnConvolution):
    def forward(self, values: Tensor) -> Tensor:
        return F.conv2d(values, self.kernel * 2, padding=1)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]

    def forward(self, values: Tensor) -> Tensor:
        return self.inner[0](values)


class Kept(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.inner = {"first": self.inner[0]}

    def forward(self, values: Tensor) -> Tensor:
        return self.inner["first"](values)


CASES = {
    OwnConvolution: "a convolution with weights .* (the parameter or buffer 2.kernel); use a layer such as nn.Conv2d",
    OwnLinear: "a product with weights .* (the parameter or buffer 2.matrix); use a layer such as nn.Linear",
    Made: "a convolution with weights .* (they are made in the forward pass); use a layer such as nn.Conv2d",
    Listed: "a convolution with .* (those of a Sequential in the Python list 2.inner); put layers into an nn.M",
    Kept: "a convolution with .* (those of a Sequential in the Python dict 2.inner); put layers into an nn.M",
}


@pytest.mark.parametrize("kind", CASES)
def test_the_reason_says_whose_the_weights_are_and_what_to_do(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), kind(), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    images, words = torch.randn(16, 3, 8, 8), CASES[kind].replace("(", r"\(").replace(")", r"\)")
    first = next(group for group in trace_groups(net, images).groups if group.name == "0")
    assert re.search(words, first.protected), first.protected
    with pytest.raises(InputError, match=words) as refused:
        lit_prune.compress(net, [images])
    assert "\n" not in str(refused.value)
