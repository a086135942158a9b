"""Builds a backbone by name: the project's own, torchvision's, timm's."""

import difflib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torchvision import models as torchvision_models

from lit_prune.errors import InputError
from lit_prune.models.anatomy import find_head
from lit_prune.models.cifar_resnet import CifarResNet, ProjectionResNet, WideStemResNet
from lit_prune.models.small import MLP, ConvNet
from lit_prune.models.stems import use_cifar_stem, use_input_channels

OWN_BACKBONES: dict[str, Callable[..., nn.Module]] = {
    **{f"cifar_resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
    **{f"cifar_resnet{depth}_wide_stem": partial(WideStemResNet, depth) for depth in (8, 14, 20)},
    "cifar_resnet32_projection": partial(ProjectionResNet, 32),
    "cifar_convnet": ConvNet,
    "mlp": MLP,
}
TIMM_ALIASES = {"deit_tiny": "deit_tiny_patch16_224"}
STEMS = ("imagenet", "cifar")


def build_backbone(
    name: str,
    num_classes: int = 1000,
    *,
    stem: str = "imagenet",
    in_channels: int = 3,
    pretrained: bool = False,
    **arguments: Any,
) -> nn.Module:
    """A new backbone whose forward maps images [N, C, H, W] to logits [N, num_classes].

    A name is looked up among the project's own networks, then torchvision's, then timm's; `timm/NAME` is always
    timm's. The same call with `pretrained=False` gives the same structure without a download.

    Args:
        name: One of `backbone_names()`, or any timm classification model.
        num_classes: Width of the classifier; a pretrained one of another width is replaced by a new one.
        stem: "imagenet" is the library's own first layers, "cifar" those of `stems.use_cifar_stem` for 32x32 images
            (ResNet, VGG, MobileNetV2, AlexNet of torchvision). The project's own networks have one stem only.
        in_channels: Channels of the images, 1 for MNIST.
        pretrained: Start from the library's best published weights, which it downloads.
        **arguments: Further arguments of the network's constructor, plain JSON values.

    Raises:
        InputError: Unknown name, stem or argument, or a download that failed.
    """
    _check(num_classes, stem, in_channels, arguments)
    build = _builder(name)
    try:
        model = build(num_classes=num_classes, in_channels=in_channels, pretrained=pretrained, **arguments)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"backbone {name!r} with arguments {arguments}: {_first_line(error)}") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise InputError(
            f"no pretrained weights for {name!r}: {_first_line(error)}; use pretrained=False and a local file"
        ) from error
    if stem == "cifar" and name not in OWN_BACKBONES:
        use_cifar_stem(model)
    return model


def backbone_names() -> tuple[str, ...]:
    """Names of the project's own networks, torchvision's classification models and the timm short names, sorted.

    Beyond these `build_backbone` takes any timm name, as `timm/NAME` or bare where torchvision has none such.
    """
    return tuple(sorted({*OWN_BACKBONES, *TIMM_ALIASES, *_torchvision_names()}))


def _check(num_classes: int, stem: str, in_channels: int, arguments: dict[str, Any]) -> None:
    if stem not in STEMS:
        raise InputError(f"stem={stem!r} is unknown: use one of {', '.join(STEMS)}")
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise InputError(f"{argument}={value} must be at least 1")
    try:
        json.dumps(arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"backbone arguments must be plain JSON values, got {arguments}: {error}") from error


def _builder(name: str) -> Callable[..., nn.Module]:
    if name in OWN_BACKBONES:
        return partial(_build_own, name)
    if name in _torchvision_names():
        return partial(_build_torchvision, name)
    import timm  # takes seconds, so only when a name is neither ours nor torchvision's

    bare = name.removeprefix("timm/")
    timm_name = TIMM_ALIASES.get(bare, bare)
    if timm.is_model(timm_name):
        return partial(_build_timm, timm_name)
    timm_names = {*timm.list_models(), *TIMM_ALIASES}
    known = {*backbone_names(), *timm_names, *(f"timm/{model}" for model in timm_names)}
    near = difflib.get_close_matches(name, sorted(known), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`backbone_names()` lists the names"
    raise InputError(f"backbone {name!r} is unknown: {hint}")


def _torchvision_names() -> list[str]:
    return torchvision_models.list_models(module=torchvision_models)


def _build_own(name: str, *, pretrained: bool, **arguments: Any) -> nn.Module:
    if pretrained:
        raise InputError(f"backbone {name!r} has no weights to download: use pretrained=False and a local file")
    return OWN_BACKBONES[name](**arguments)


def _build_torchvision(name: str, *, num_classes: int, in_channels: int, pretrained: bool, **arguments: Any):
    auxiliary = name in ("googlenet", "inception_v3")
    if auxiliary:  # said here, because their pretrained and fresh versions have different defaults
        arguments = {"transform_input": in_channels == 3, "init_weights": not pretrained, **arguments}
    source = {"weights": "DEFAULT"} if pretrained else {"num_classes": num_classes}
    model = torchvision_models.get_model_builder(name)(**source, **arguments)
    if auxiliary:
        _remove_auxiliary_heads(model)
    if pretrained:
        _resize_head(model, num_classes)
    use_input_channels(model, in_channels, pretrained)
    return model


def _build_timm(name: str, *, num_classes: int, in_channels: int, pretrained: bool, **arguments: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained, num_classes=num_classes, in_chans=in_channels, **arguments)


def _remove_auxiliary_heads(model: nn.Module) -> None:
    """Makes the forward in training return logits, not a tuple."""
    model.aux_logits = False
    for head in ("AuxLogits", "aux1", "aux2"):
        if hasattr(model, head):
            setattr(model, head, None)


def _resize_head(model: nn.Module, num_classes: int) -> None:
    name = find_head(model)
    head = model.get_submodule(name)
    if head.out_features != num_classes:
        parent, _, child = name.rpartition(".")
        replacement = nn.Linear(head.in_features, num_classes, bias=head.bias is not None)
        setattr(model.get_submodule(parent), child, replacement)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
