"""A network by name, or by the import path that the caller vouches for: nothing that only a file names is imported."""

import importlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError, first_line
from lit_prune.models.registry import build_backbone, check_arguments
from lit_prune.running import undisturbed


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

    Args:
        model: the network.
        image_shape: (C, H, W) of the data's images.
        num_classes: of the data.
        name: of the backbone, for the message.

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
