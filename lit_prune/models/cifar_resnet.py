"""Residual networks for 32x32 images (He et al. 2016, section 4.2) and the three ways their shortcuts change shape."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class PaddedShortcut(nn.Module):
    """Option A shortcut: every second pixel, and channels routed by a fixed table with zeros where it says -1.

    `y[:, o] = x[:, source[o], ::2, ::2]`, or 0 where `source[o]` is -1. A fresh module is the shortcut of He et al.:
    the input channels in the middle, half of the padding before them and half after. Input and output channels can be
    removed independently, because the table, not a position, ties them. It holds no parameter and nothing in the
    state_dict, so published weights load strictly; the table is structure, and replaying a plan restores it.

    Args:
        in_channels: Width of the input.
        out_channels: Width of the output, at least `in_channels`.
        stride: Distance of the pixels that are kept; 2 as published.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(f"out_channels={out_channels} is below in_channels={in_channels}: nothing to pad")
        self.in_channels = in_channels
        self.stride = stride
        before = (out_channels - in_channels) // 2
        after = out_channels - in_channels - before
        self.source = [-1] * before + list(range(in_channels)) + [-1] * after

    @property
    def source(self) -> list[int]:
        """Input channel of each output channel, -1 for zeros (a copy: assign a new list to change it)."""
        return list(self._source)

    @source.setter
    def source(self, source: Sequence[int]) -> None:
        """Takes another table."""
        if any(not -1 <= channel < self.in_channels for channel in source):
            raise ValueError(f"source={list(source)} names a channel outside 0..{self.in_channels - 1}")
        self._source = [int(channel) for channel in source]
        self._padding = _padding(self._source, self.in_channels)
        device = self.index.device if "index" in self._buffers else None
        index = [self.in_channels if channel < 0 else channel for channel in self._source]
        self.register_buffer("index", torch.tensor(index, dtype=torch.long, device=device), persistent=False)

    @property
    def out_channels(self) -> int:
        """Width of the output."""
        return len(self._source)

    def forward(self, images: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        kept = images[:, :, :: self.stride, :: self.stride]
        if self._padding is not None:  # every input channel in order: a pad keeps the memory format, and is faster
            return functional.pad(kept, (0, 0, 0, 0, *self._padding))
        return functional.pad(kept, (0, 0, 0, 0, 0, 1)).index_select(1, self.index)

    def prune_in(self, indices: Iterable[int]) -> None:
        """Removes input channels: outputs that came from them become zeros, the outputs' number stays."""
        removed = _checked(indices, self.in_channels, "in_channels")
        kept = [channel for channel in range(self.in_channels) if channel not in removed]
        position = {channel: new for new, channel in enumerate(kept)}
        source = [position.get(channel, -1) for channel in self._source]
        self.in_channels = len(kept)
        self.source = source

    def prune_out(self, indices: Iterable[int]) -> None:
        """Removes output channels: their entries of the table are deleted."""
        removed = _checked(indices, self.out_channels, "out_channels")
        self.source = [channel for position, channel in enumerate(self._source) if position not in removed]

    def extra_repr(self) -> str:
        """Widths and stride, for printing."""
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


def _checked(indices: Iterable[int], size: int, name: str) -> set[int]:
    removed = {int(index) for index in indices}
    if any(not 0 <= index < size for index in removed):
        raise ValueError(f"indices={sorted(removed)} are not all within {name}={size}")
    if len(removed) == size:
        raise ValueError(f"removing all {size} channels leaves {name} empty: keep one at least")
    return removed


def _padding(source: list[int], in_channels: int) -> tuple[int, int] | None:
    """Zeros before and after when `source` is one run of all input channels in order between zeros, else None."""
    run = list(range(in_channels))
    before = source.index(0) if 0 in source else len(source)
    after = len(source) - before - in_channels
    return (before, after) if source == [-1] * before + run + [-1] * after else None


def _convolution(in_channels: int, out_channels: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """1x1 convolution and norm where the shape changes, else nothing (option B)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class _Residual(nn.Module):
    """The residual branch every block shares: convolution, norm, ReLU, convolution, norm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = _convolution(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def residual(self, images: Tensor) -> Tensor:
        """[N, in, H, W] to [N, out, H / stride, W / stride]."""
        return self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(images)))))


class PaddedBlock(_Residual):
    """Basic block with the parameter-free shortcut (option A) and a ReLU after the addition."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, stride)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else PaddedShortcut(in_channels, out_channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """[N, in, H, W] to [N, out, H / stride, W / stride]."""
        return self.relu2(self.residual(images) + self.shortcut(images))


class ProjectionBlock(_Residual):
    """Basic block with a 1x1 projection where the shape changes and a ReLU after the addition."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.downsample = _projection(in_channels, out_channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """[N, in, H, W] to [N, out, H / stride, W / stride]."""
        return self.relu2(self.residual(images) + self.downsample(images))


class LinearTrunkBlock(_Residual):
    """Basic block with a 1x1 projection where the shape changes and no ReLU after the addition."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = _projection(in_channels, out_channels, stride)

    def forward(self, images: Tensor) -> Tensor:
        """[N, in, H, W] to [N, out, H / stride, W / stride]."""
        return self.residual(images) + self.shortcut(images)


def _stage(block: type[_Residual], in_channels: int, out_channels: int, count: int, stride: int) -> nn.Sequential:
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(count - 1)))


def _blocks_per_stage(depth: int) -> int:
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth={depth} is not 6n + 2 (8, 14, 20, 32, 44, 56, ...)")
    return (depth - 2) // 6


def _initialise(model: nn.Module) -> None:
    """Kaiming normal for every convolution and linear layer, as in He et al."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)


class CifarResNet(nn.Module):
    """CIFAR ResNet of He et al. with 6n + 2 layers and option A shortcuts; ResNet-20 has 269,722 parameters.

    Args:
        depth: 20, 32, 44, 56, 110, or any 6n + 2.
        num_classes: Width of the classifier `linear`.
        in_channels: Channels of the images.
        width: Channels of the first stage; the next two have twice and four times as many.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        count = _blocks_per_stage(depth)
        self.conv1 = _convolution(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(PaddedBlock, width, width, count, 1)
        self.layer2 = _stage(PaddedBlock, width, 2 * width, count, 2)
        self.layer3 = _stage(PaddedBlock, 2 * width, 4 * width, count, 2)
        self.linear = nn.Linear(4 * width, num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] to logits [N, K]."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))  # [N, 4 width, H / 4, W / 4]
        return self.linear(features.mean((2, 3)))


class WideStemResNet(nn.Module):
    """CIFAR ResNet with a 64-channel stem, projections in all three stages and a linear trunk inside each stage.

    One ReLU follows each stage instead of each block. The 8x8 map is average-pooled to 2x2 and flattened, so each
    trunk channel takes 4 columns of `linear`; images must be 32x32.

    Args:
        depth: 8, 14, 20, or any 6n + 2.
        num_classes: Width of the classifier `linear`.
        in_channels: Channels of the images.
    """

    def __init__(self, depth: int, num_classes: int = 100, in_channels: int = 3) -> None:
        super().__init__()
        count = _blocks_per_stage(depth)
        self.conv1 = _convolution(in_channels, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = _stage(LinearTrunkBlock, 64, 16, count, 1)
        self.relu1 = nn.ReLU()
        self.layer2 = _stage(LinearTrunkBlock, 16, 32, count, 2)
        self.relu2 = nn.ReLU()
        self.layer3 = _stage(LinearTrunkBlock, 32, 64, count, 2)
        self.relu3 = nn.ReLU()
        self.pool = nn.AvgPool2d(4)
        self.linear = nn.Linear(256, num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, 32, 32] to logits [N, K]."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.relu1(self.layer1(features))  # [N, 16, 32, 32]
        features = self.relu2(self.layer2(features))  # [N, 32, 16, 16]
        features = self.relu3(self.layer3(features))  # [N, 64, 8, 8]
        return self.linear(torch.flatten(self.pool(features), 1))


class ProjectionResNet(nn.Module):
    """CIFAR ResNet with 1x1 projections (option B), a biased stem and the first block of each stage on its own.

    Args:
        depth: 32, or any 6n + 2 from 14 on.
        num_classes: Width of the classifier `fc`.
        in_channels: Channels of the images.
    """

    def __init__(self, depth: int, num_classes: int = 200, in_channels: int = 3) -> None:
        super().__init__()
        rest = _blocks_per_stage(depth) - 1
        self.conv1 = _convolution(in_channels, 16, bias=True)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.block1 = ProjectionBlock(16, 16, 1)
        self.blocks2 = _stage(ProjectionBlock, 16, 16, rest, 1)
        self.block3 = ProjectionBlock(16, 32, 2)
        self.blocks4 = _stage(ProjectionBlock, 32, 32, rest, 1)
        self.block5 = ProjectionBlock(32, 64, 2)
        self.blocks6 = _stage(ProjectionBlock, 64, 64, rest, 1)
        self.fc = nn.Linear(64, num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] to logits [N, K]."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.blocks2(self.block1(features))  # [N, 16, H, W]
        features = self.blocks4(self.block3(features))  # [N, 32, H / 2, W / 2]
        features = self.blocks6(self.block5(features))  # [N, 64, H / 4, W / 4]
        return self.fc(features.mean((2, 3)))
