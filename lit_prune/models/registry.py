"""Builds a backbone by name: the project's own, torchvision's, timm's."""

import difflib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from lit_prune.errors import InputError, first_line
from lit_prune.models.anatomy import find_head
from lit_prune.models.cifar_resnet import CifarResNet, ProjectionResNet, WideStemResNet
from lit_prune.models.published import published_file
from lit_prune.models.small import MLP, ConvNet
from lit_prune.models.stems import use_cifar_stem, use_input_channels
from lit_prune.models.weights import load_weights

OWN_BACKBONES: dict[str, Callable[..., nn.Module]] = {
    **{f"cifar_resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
    **{f"cifar_resnet{depth}_wide_stem": partial(WideStemResNet, depth) for depth in (8, 14, 20)},
    "cifar_resnet32_projection": partial(ProjectionResNet, 32),
    "cifar_convnet": ConvNet,
    "mlp": MLP,
}
TIMM_ALIASES = {"deit_tiny": "deit_tiny_patch16_224"}
STEMS = ("imagenet", "cifar")
FETCHING = re.compile(r"(pretrained|weights).*|checkpoint_path|cache_dir|progress")
"""Arguments of the libraries' builders that read files or download; `build_backbone` has its own for that."""
DEEPEST = 20


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
    check_arguments(name, arguments)
    _check(num_classes, stem, in_channels)
    _check_fetching(name, arguments)
    build = _builder(name)
    try:
        model = build(num_classes=num_classes, in_channels=in_channels, pretrained=pretrained, **arguments)
    except InputError:
        raise
    except Exception as error:  # a constructor has its own exceptions for arguments that do not suit it
        if pretrained and isinstance(error, OSError | RuntimeError):
            raise InputError(
                f"no pretrained weights for {name!r}: {first_line(error)}; use pretrained=False and a local file"
            ) from error
        given = {"num_classes": num_classes, "in_channels": in_channels, **arguments}
        raise InputError(f"backbone {name!r} with arguments {given}: {first_line(error)}") from error
    if stem == "cifar" and name not in OWN_BACKBONES:
        use_cifar_stem(model)
    return model


def backbone_names() -> tuple[str, ...]:
    """Names of the project's own networks, torchvision's classification models and the timm short names, sorted.

    Beyond these `build_backbone` takes any timm name, as `timm/NAME` or bare where torchvision has none such.
    """
    return tuple(sorted({*OWN_BACKBONES, *TIMM_ALIASES, *_torchvision_names()}))


def check_arguments(name: str, arguments: Any) -> None:
    """Refuses what is no name, and arguments that are not plain.

    Args:
        name: of the backbone, for the message.
        arguments: numbers, strings, booleans, None, and lists and dicts of these, by their names.

    Raises:
        InputError: as said; the argument is named.
    """
    if not isinstance(name, str):
        raise InputError(f"backbone must be a name, got {name!r}; `backbone_names()` lists them")
    if not isinstance(arguments, dict):
        raise InputError(f"backbone {name!r}: arguments must be a dict by name, got {type(arguments).__name__}")
    for key, value in arguments.items():
        if not isinstance(key, str) or not _is_plain(value):
            raise InputError(f"backbone {name!r}: arguments must be plain JSON values, got {key!r}: {value!r:.80}")


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, dict):
        parts = list(value.values()) if all(isinstance(key, str) for key in value) else [object()]
    elif isinstance(value, list | tuple):
        parts = list(value)
    else:
        return value is None or isinstance(value, bool | int | float | str)
    return depth < DEEPEST and all(_is_plain(part, depth + 1) for part in parts)


def _check(num_classes: int, stem: str, in_channels: int) -> None:
    if stem not in STEMS:
        raise InputError(f"stem={stem!r} is unknown: use one of {', '.join(STEMS)}")
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if type(value) is not int or value < 1:
            raise InputError(f"{argument}={value} must be a whole number of at least 1")


def _check_fetching(name: str, arguments: dict[str, Any]) -> None:
    """Refuses what would have a library's builder read a file or download one."""
    for key, value in arguments.items():
        if FETCHING.fullmatch(key) and value not in (None, False):
            raise InputError(
                f"backbone {name!r}: argument {key!r} is refused, it would read or fetch a file; "
                "give pretrained=True, or the file to load_weights (--model.weights)"
            )


def _builder(name: str) -> Callable[..., nn.Module]:
    if name in OWN_BACKBONES:
        return partial(_build_own, name)
    if name in _torchvision_names():
        return partial(_build_torchvision, name)
    import timm  # takes seconds, so only when a name is neither ours nor torchvision's

    bare = name.removeprefix("timm/")  # what is left is looked up in timm's registry: no hub, no folder, no URL
    timm_name = TIMM_ALIASES.get(bare, bare)
    if timm.is_model(timm_name):
        return partial(_build_timm, timm_name)
    timm_names = {*timm.list_models(), *TIMM_ALIASES}
    known = {*backbone_names(), *timm_names, *(f"timm/{model}" for model in timm_names)}
    near = difflib.get_close_matches(name, sorted(known), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`backbone_names()` lists the names"
    hint += "; a callable of your own is package.module:callable" if "." in name and not near else ""
    raise InputError(f"backbone {name!r} is unknown: {hint}")


def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


def _build_own(name: str, *, pretrained: bool, **arguments: Any) -> nn.Module:
    model = OWN_BACKBONES[name](**arguments)
    if pretrained:
        load_weights(model, published_file(name))
    return model


def _build_torchvision(name: str, *, num_classes: int, in_channels: int, pretrained: bool, **arguments: Any):
    from torchvision import models

    auxiliary = name in ("googlenet", "inception_v3")
    if auxiliary:  # said here, because their pretrained and fresh versions have different defaults
        arguments = {"transform_input": in_channels == 3, "init_weights": not pretrained, **arguments}
    source = {"weights": "DEFAULT"} if pretrained else {"num_classes": num_classes}
    model = models.get_model_builder(name)(**source, **arguments)
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
    for head, absent in {"aux_logits": False, "AuxLogits": None, "aux1": None, "aux2": None}.items():
        if hasattr(model, head):
            setattr(model, head, absent)


def _resize_head(model: nn.Module, num_classes: int) -> None:
    name = find_head(model)
    head = model.get_submodule(name)
    if head.out_features != num_classes:
        parent, _, child = name.rpartition(".")
        replacement = nn.Linear(head.in_features, num_classes, bias=head.bias is not None)
        setattr(model.get_submodule(parent), child, replacement)
