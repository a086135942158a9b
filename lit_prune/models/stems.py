"""Fits ImageNet networks of torchvision to other tasks: 32x32 images, images that are not RGB, other classes."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.models.anatomy import find_head

if TYPE_CHECKING:  # torchvision takes seconds, and other networks do without it
    from torchvision.models import VGG, AlexNet, MobileNetV2, ResNet


def use_cifar_stem(model: nn.Module) -> None:
    """Replaces, in place, what shrinks a 32x32 image too early.

    - ResNet: 3x3 stride-1 `conv1`, no max-pool.
    - MobileNetV2: first convolution with stride 1.
    - VGG: the convolutions stay; the 7x7 pool, which at 32 pixels only repeats each value 49 times, becomes 1x1, and
      the 49 columns of `classifier.0` that saw one value become their sum. The function at 32x32 stays the same.
    - AlexNet: 3x3 stride-1 first convolution; the 6x6 pool becomes 3x3, `classifier.1` is folded likewise.

    Replaced convolutions start from scratch, in pretrained networks too.

    Raises:
        InputError: The network is of another family.
    """
    from torchvision import models

    for family, change in _CIFAR_STEMS.items():
        if isinstance(model, getattr(models, family)):
            change(model)
            return
    known = ", ".join(sorted(_CIFAR_STEMS))
    raise InputError(
        f"stem='cifar' is not known for {type(model).__name__}: use stem='imagenet' or a torchvision {known}"
    )


def use_input_channels(model: nn.Module, in_channels: int, pretrained: bool) -> None:
    """Gives the first convolution `in_channels` inputs, in place; pretrained RGB kernels are summed for one channel."""
    name, first = next((name, child) for name, child in model.named_modules() if isinstance(child, nn.Conv2d))
    if first.in_channels == in_channels:
        return
    replacement = _fresh_convolution(first, in_channels, first.kernel_size, first.stride, first.padding)
    if pretrained and in_channels == 1:
        with torch.no_grad():
            replacement.weight.copy_(first.weight.sum(1, keepdim=True))
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, replacement)


def _fresh_convolution(like: nn.Conv2d, in_channels: int, kernel, stride, padding) -> nn.Conv2d:
    convolution = nn.Conv2d(in_channels, like.out_channels, kernel, stride, padding, bias=like.bias is not None)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution


def _fold_repeats(linear: nn.Linear, side: int, repeats: int) -> nn.Linear:
    """The same map for inputs [C, side, side] of which `linear` saw each value repeats x repeats times."""
    weight = linear.weight.detach().unflatten(1, (-1, side, repeats, side, repeats)).sum((3, 5)).flatten(1)
    folded = nn.Linear(weight.shape[1], linear.out_features)
    with torch.no_grad():
        folded.weight.copy_(weight)
        folded.bias.copy_(linear.bias)
    return folded


def _resnet(model: "ResNet") -> None:
    model.conv1 = _fresh_convolution(model.conv1, model.conv1.in_channels, 3, 1, 1)
    model.maxpool = nn.Identity()


def _mobilenet_v2(model: "MobileNetV2") -> None:
    model.features[0][0].stride = (1, 1)


def _vgg(model: "VGG") -> None:
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier[0] = _fold_repeats(model.classifier[0], side=1, repeats=7)


def _alexnet(model: "AlexNet") -> None:
    model.features[0] = _fresh_convolution(model.features[0], model.features[0].in_channels, 3, 1, 1)
    model.avgpool = nn.AdaptiveAvgPool2d(3)
    model.classifier[1] = _fold_repeats(model.classifier[1], side=3, repeats=2)


_CIFAR_STEMS: dict[str, Callable[..., None]] = {  # by the name of torchvision's class
    "ResNet": _resnet,
    "MobileNetV2": _mobilenet_v2,
    "VGG": _vgg,
    "AlexNet": _alexnet,
}


def resize_head(model: nn.Module, num_classes: int) -> None:
    """Gives a network a new classifier where it has one of another width."""
    name = find_head(model)
    head = model.get_submodule(name)
    if head.out_features != num_classes:
        parent, _, child = name.rpartition(".")
        replacement = nn.Linear(head.in_features, num_classes, bias=head.bias is not None)
        setattr(model.get_submodule(parent), child, replacement)
