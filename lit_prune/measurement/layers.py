"""Which layers a measurement looks at, and how a model is run without leaving a trace on it."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.running import removing, undisturbed
from lit_prune.structure.axes import CONVOLUTIONS, width
from lit_prune.structure.example import Example

Batches = Iterable[Any]  # see `lit_prune.task`
CHANNEL_LAYERS = (*CONVOLUTIONS, nn.Linear)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
MOST_NAMED = 4
LOGGER = logging.getLogger(__name__)
KINDS = "convolution or linear layer"


def select_layers(model: nn.Module, layers: Sequence[str] | str | None = None) -> dict[str, nn.Module]:
    """The convolutions (of any dimension, transposed ones too) and linear layers by qualified name, in module order.

    Args:
        model: any network.
        layers: names or fnmatch patterns (`layer1.*.conv?`); None takes all of them, the classifier head included.

    Raises:
        InputError: a pattern matches no layer.
    """
    found: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, CHANNEL_LAYERS)}
    if layers is None:
        return found
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            some = ", ".join(list(found)[:4]) or "none"
            raise InputError(f"layers: no {KINDS} matches {pattern!r}; some of the {len(found)}: {some}")
    return {n: m for n, m in found.items() if any(fnmatchcase(n, pattern) for pattern in patterns)}


def other_weights(model: nn.Module) -> dict[str, str]:
    """Modules with a matrix of weights of their own that are no `CHANNEL_LAYERS`, by name, with what they are.

    Norms and embeddings are not among them: they make no channels.
    """
    found = {}
    for name, module in model.named_modules():
        matrices = [n for n, p in module.named_parameters(recurse=False) if "weight" in n and p.ndim > 1]
        if matrices and not isinstance(module, (*CHANNEL_LAYERS, *NORM_LAYERS, nn.Embedding, nn.EmbeddingBag)):
            found[name] = type(module).__name__
    return found


def say_left_out(left_out: Mapping[str, str]) -> None:
    """One line about layers that are left out, by name with the reason; said once in a process."""
    if left_out:
        named = [f"{name!r} {reason}" for name, reason in list(left_out.items())[:MOST_NAMED]]
        more = len(left_out) - len(named)
        _say_once(f"layers left out: {'; '.join(named)}{f'; and {more} more' if more > 0 else ''}")


@cache
def _say_once(line: str) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()):
        LOGGER.warning(line)


def out_channels(module: nn.Module) -> int:
    """Number of output channels of a convolution or linear layer."""
    return width(module, "out")


def weight_rows(module: nn.Module) -> Tensor:
    """Kernels w_i of a layer's output channels, flattened, float64 [N, inputs·taps], detached, on the CPU."""
    return by_output(module).to("cpu", torch.float64).flatten(1)


def by_output(module: nn.Module) -> Tensor:
    """A layer's weight with its output channels first, [N, inputs of a group, *taps], detached.

    Transposed convolutions keep theirs as [inputs, outputs of a group, *taps].
    """
    weight = module.weight.detach()
    if not isinstance(module, TRANSPOSED):
        return weight
    return weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)


def position_view(module: nn.Module, values: Tensor, token: int | None) -> Tensor:
    """What a layer reads or puts out as [B, P, N] (images, positions, channels), without a copy where strides allow it.

    Convolutions: P = the size of the map. Linear on [B, N]: P = 1; on tokens [B, T, N]: the chosen token alone (P = 1),
    or all of them with `token=None`; on [B, H, W, N] and more: all positions. Other modules that put out three
    dimensions are read as tokens; with four, by the axis that is as wide as their last layer.

    Raises:
        InputError: not one tensor with channels, or no such token.
    """
    if not isinstance(values, Tensor) or values.ndim < 1:
        raise InputError(f"model: a {type(module).__name__} reads or returns {type(values).__name__}, not one tensor")
    if isinstance(module, CONVOLUTIONS):
        batched = values if values.ndim == module.weight.ndim else values[None]
        return batched.flatten(2).transpose(1, 2)
    if values.ndim < 3:
        return values.reshape(-1, 1, values.shape[-1])
    if not channels_last(module, values):
        return values.flatten(2).transpose(1, 2)
    if values.ndim > 3 or token is None:
        return values.flatten(1, -2)
    if not -values.shape[1] <= token < values.shape[1]:
        raise InputError(f"token: {token} is not one of the {values.shape[1]} tokens; give a smaller index or None")
    return values[:, token][:, None]


def channels_last(module: nn.Module, values: Tensor) -> bool:
    """Whether the channels of a module's output [B, ...] of three or more dimensions are its last axis."""
    if isinstance(module, nn.Linear):
        return True
    inside = [layer for layer in module.modules() if isinstance(layer, CHANNEL_LAYERS)]
    wide = out_channels(inside[-1]) if inside else -1
    if (values.shape[1] == wide) != (values.shape[-1] == wide):
        return values.shape[-1] == wide
    return values.ndim == 3


@contextmanager
def without_gradients() -> Iterator[None]:
    """No gradients inside, and tensors that may be written to later, although inference mode is on around it."""
    with torch.inference_mode(False), torch.no_grad():  # in this order: the first switches gradients on
        yield


def following_norms(model: nn.Module, example: Example) -> dict[str, str]:
    """Name of the norm that reads each layer's output, found by running the model once.

    A norm follows a layer when the very tensor that the layer returned, unchanged since, is the norm's input; names and
    module order are not looked at. A layer that no norm follows is absent.

    Args:
        model: any network.
        example: what it is called with, on its device; one sample is enough.
    """
    outputs: list[tuple[str, Tensor, int]] = []  # the tensors are held, so that no identity is reused
    norms: dict[str, str] = {}

    def remember(name: str):
        return lambda module, inputs, output: outputs.append((name, output, output._version))

    def look_up(name: str, module: nn.Module, inputs: tuple) -> None:
        for layer, output, version in outputs:
            if inputs and inputs[0] is output and output._version == version:
                norms[layer] = name

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, CHANNEL_LAYERS):
            handles.append(module.register_forward_hook(remember(name)))
        elif isinstance(module, NORM_LAYERS):
            handles.append(module.register_forward_pre_hook(partial(look_up, name)))
    with removing(handles), undisturbed(model):
        model(*example.args, **example.kwargs)
    return norms
