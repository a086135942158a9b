"""Layers of classes derived from torch's, with a forward of their own: are they the map of the weights that they hold?

A convolution that pads in its own way ("same" as TensorFlow pads, by reflection) is one of the map that it has padded.
One that scales or standardises its weights is not the convolution of those that it holds: nothing solved for them is
right.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_prune.running import buffers_kept
from lit_prune.structure.axes import CONVOLUTIONS

_FUNCTIONS: tuple[Callable[..., Tensor], ...] = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_MARGIN = 3  # places of the map that is tried beyond the kernel


def has_own_forward(module: nn.Module) -> bool:
    """Whether another forward than that of torch's class runs."""
    base = next(kind for kind in (nn.Linear, *CONVOLUTIONS) if isinstance(module, kind))
    methods = [name for name in ("forward", "_conv_forward") if hasattr(base, name)]
    return any(name in vars(module) or getattr(type(module), name) is not getattr(base, name) for name in methods)


def keeps_its_map(module: nn.Module) -> bool:
    """Whether what a layer with a forward of its own gives is its plain map of what it reads, padded at most.

    Tried on one input; a forward that does not run on a map alone does not.
    """
    taps = getattr(module, "kernel_size", ())
    apart = getattr(module, "dilation", ())
    sizes = [(size - 1) * step + _MARGIN for size, step in zip(taps, apart, strict=True)]
    width = module.weight.shape[1] * getattr(module, "groups", 1)
    values = torch.arange(1, 1 + width * math.prod(sizes), device=module.weight.device)
    inputs = values.to(module.weight.dtype).cos().view(1, width, *sizes)
    with torch.no_grad(), buffers_kept(module), _Seen() as seen:
        try:
            output = module.forward(inputs)
        except Exception:  # whatever somebody's code raises
            return False
    if len(seen.calls) != 1:
        return False
    call, found = seen.calls[0]
    kept = ("stride", "dilation") if taps else ()
    same = all(_tuple(call[name], len(taps)) == getattr(module, name) for name in kept)
    owns = call["weight"] is module.weight and call["bias"] is module.bias
    return owns and same and output is found and not found._version and _within(inputs, call["input"])


def padded_map(module: nn.Module, inputs: Tensor) -> Tensor:
    """The map over which the kernel of a convolution that `keeps_its_map` slides.

    Args:
        module: the convolution.
        inputs: [B, C, ...]; any number of channels.
    """
    with _Seen(stop=True) as seen, contextlib.suppress(_Stop):
        module.forward(inputs)
    call, _ = seen.calls[0]
    padding = call["padding"]
    if isinstance(padding, str):
        ends = [
            apart * (taps - 1) * (padding == "same")
            for taps, apart in zip(module.kernel_size, module.dilation, strict=True)
        ]
        sides = [(whole // 2, whole - whole // 2) for whole in ends]
    else:
        sides = [(side, side) for side in _tuple(padding, len(module.kernel_size))]
    return F.pad(call["input"], [side for pair in reversed(sides) for side in pair])


class _Stop(Exception):
    """What was asked for has been seen."""


class _Seen(TorchFunctionMode):
    """Notes the products of weights and maps: what each was called with, by name, and what it gave."""

    def __init__(self, stop: bool = False) -> None:
        super().__init__()
        self.stop = stop
        self.calls: list[tuple[dict[str, Any], Any]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in _FUNCTIONS:
            return function(*args, **(kwargs or {}))
        call = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        call |= dict(zip(_NAMES, args, strict=False)) | (kwargs or {})
        if self.stop:
            self.calls.append((call, None))
            raise _Stop
        found = function(*args, **(kwargs or {}))
        self.calls.append((call, found))
        return found


def _within(inputs: Tensor, padded: Tensor) -> bool:
    """Whether a map is another one with something around it."""
    if inputs.dim() == 2 or padded is inputs:
        return padded is inputs
    for axis in range(2, inputs.dim()):
        more = padded.shape[axis] - inputs.shape[axis]
        if more < 0:
            return False
        padded = padded.narrow(axis, more // 2, inputs.shape[axis])
    return torch.equal(padded, inputs)


def _tuple(value: Any, count: int) -> Any:
    """One number for each axis."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
