"""Builds a backbone by name (own, torchvision's, timm's), or by the import path that the caller vouches for."""

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError, first_line
from lit_prune.models.cifar_resnet import CifarResNet, ProjectionResNet, WideStemResNet
from lit_prune.models.small import MLP, ConvNet
from lit_prune.models.stems import resize_head, use_cifar_stem, use_input_channels
from lit_prune.models.weights import load_weights, published_file
from lit_prune.running import undisturbed

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
        resize_head(model, num_classes)
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


def build_network(
    backbone: str,
    arguments: dict[str, Any] | None = None,
    pretrained: bool = False,
    *,
    trust: Iterable[str] = (),
) -> nn.Module:
    """A network by name, or by import path.

    Args:
        backbone: a name for `build_backbone`, or "package.module:callable", which is imported and called.
        arguments: keyword arguments of either, plain JSON values.
        pretrained: start from published weights (a download; names only).
        trust: import paths that the caller vouches for. A folder or a checkpoint may name any path; one that is not
            among these is refused before anything is imported.

    Raises:
        InputError: unknown name, an import path that is not trusted or leads nowhere, or one that builds no network.
    """
    arguments = {} if arguments is None else arguments
    check_arguments(backbone, arguments)
    if arguments.get("pretrained") not in (None, False, pretrained):
        raise InputError(f"backbone {backbone!r}: argument 'pretrained' does nothing, give --model.pretrained true")
    if ":" not in backbone:
        return build_backbone(backbone, **(arguments | {"pretrained": pretrained}))
    if backbone not in ({trust} if isinstance(trust, str) else set(trust)):
        raise InputError(
            f"backbone {backbone!r} is an import path, which is not imported because a file names it; if the file is "
            f"yours, give trust=({backbone!r},) or model=; on the command line --model.backbone {backbone}, or for a "
            f"verb without a model --trust '[{backbone}]'"
        )
    if pretrained:
        raise InputError(f"backbone {backbone!r} is an import path; pretrained=True works with names only")
    return _call(backbone, arguments)


def check_forward(model: nn.Module, image_shape: Sequence[int], num_classes: int, name: str) -> None:
    """Passes one grey image through a network, which is left as it was, random state included.

    Raises:
        InputError: it does not take such images, or has fewer outputs than there are classes.
    """
    try:
        with undisturbed(model):
            output = model(torch.zeros(1, *image_shape))
    except Exception as error:  # whatever its layers say of an image that is too small, or of other channels
        raise InputError(
            f"backbone {name!r} does not take the data's images of shape {list(image_shape)}: {first_line(error)}; "
            "choose another backbone, its arguments (stem, in_channels, img_size) or the data's resolution"
        ) from error
    if not isinstance(output, Tensor) or output.shape[:1] != (1,) or output.dim() != 2:
        raise InputError(f"backbone {name!r} returns no logits [N, num_classes] for images of {list(image_shape)}")
    if output.shape[1] < num_classes:
        raise InputError(
            f"backbone {name!r} has {output.shape[1]} outputs, the data {num_classes} classes; leave num_classes out"
        )


def taken_arguments(backbone: str, known: dict[str, Any]) -> dict[str, Any]:
    """What is known of the data, as far as a backbone takes it: names take all, somebody's callable what it names.

    Args:
        backbone: a name, or an import path that the caller vouches for.
        known: `num_classes` and `in_channels`.

    Raises:
        InputError: an import path leads nowhere.
    """
    if ":" not in backbone:
        return known
    try:
        parameters = inspect.signature(_imported(backbone)).parameters.values()
    except (TypeError, ValueError):  # a callable that does not say
        return known
    everything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in known.items() if everything or name in names}


def _imported(path: str) -> Callable[..., Any]:
    package, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(package), attribute)
    except Exception as error:  # whatever the imported module raises
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"backbone {path!r} cannot be imported ({problem}); give package.module:callable") from error


def _call(path: str, arguments: dict[str, Any]) -> nn.Module:
    """What the callable at an import path returns, which must be a network."""
    builder = _imported(path)
    try:
        model = builder(**arguments)
    except InputError:
        raise
    except Exception as error:  # the callable is the user's, and so are its arguments
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"backbone {path!r} with arguments {arguments} cannot be built ({problem})") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"backbone {path!r} returns a {type(model).__name__}, no network; give one that builds it")
    return model
