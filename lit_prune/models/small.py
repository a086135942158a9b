"""Two small networks whose every hidden unit has affine consumers: a ConvNet and a multilayer perceptron."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Convolution, norm, ReLU, average pool (a few times), global average pool, `fc1`, ReLU, `fc2`.

    Pools are averages, not maxima, so that what consumes a unit's post-activation value is affine in it, as
    mechanism replacement requires. The 256 units of `fc1` are the paper's penultimate layer.

    Args:
        num_classes: Width of `fc2`.
        in_channels: Channels of the images.
        widths: Channels of the convolutions; each is followed by a halving of the map, which must last that long.
        hidden: Units of `fc1`.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, widths: Sequence[int] = (32, 64, 128), hidden: int = 256
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((in_channels, *widths), widths, strict=False):
            convolution = nn.Conv2d(before, width, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.fc1 = nn.Linear(widths[-1], hidden)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] to logits [N, K]."""
        features = self.features(images).mean((2, 3))  # [N, widths[-1]]
        return self.fc2(self.relu(self.fc1(features)))


class MLP(nn.Module):
    """Multilayer perceptron on flattened images: `layers` alternates Linear and ReLU and ends in the classifier.

    Args:
        num_classes: Width of the last Linear.
        in_channels: Channels of the images.
        hidden: Units of the hidden layers, first to last.
        image_size: Side of the square images, pixels.
        in_features: Length of the flattened input where it is not `in_channels * image_size ** 2`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        hidden: Sequence[int] = (512, 512),
        image_size: int = 28,
        in_features: int | None = None,
    ) -> None:
        super().__init__()
        first = in_channels * image_size**2 if in_features is None else in_features
        layers: list[nn.Module] = []
        for before, width in zip((first, *hidden), hidden, strict=False):
            layers += [nn.Linear(before, width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear((first, *hidden)[-1], num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """[N, ...] to logits [N, K]."""
        return self.layers(torch.flatten(images, 1))
