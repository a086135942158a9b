"""Convolutions of every kind as one, a kernel that slides over a map; and what is written into layers.

A transposed convolution with stride s is a plain one with stride 1 and flipped kernel on the map with s - 1 zeros
between its values, so that what is solved or folded for one serves the other.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_prune.replace.own_forward import has_own_forward, keeps_its_map, padded_map
from lit_prune.structure import axes
from lit_prune.structure.hooks import answers_otherwise

SLIDE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def is_solvable(module: nn.Module) -> bool:
    """Whether each output of a layer is a linear function of all channels that it reads, of weights that can be set."""
    plain = axes.is_weighted(module) and getattr(module, "groups", 1) == 1
    plain = plain and "weight" in dict(module.named_parameters(recurse=False))  # else made of others in every pass
    plain = plain and not answers_otherwise(module)
    return plain and (not has_own_forward(module) or (not is_transposed(module) and keeps_its_map(module)))


def is_transposed(module: nn.Module) -> bool:
    """Whether `module` is a transposed convolution."""
    return getattr(module, "transposed", False)


def kernel_of(module: nn.Module) -> Tensor:
    """Weights [O, C, *taps] of a layer without groups as the kernel that slides; a view, or a flipped copy."""
    weight = module.weight.detach()
    return _turned(weight) if is_transposed(module) else weight


def set_kernel(module: nn.Module, kernel: Tensor) -> None:
    """Writes a kernel, [O, C, *taps] or flattened, into a convolution or linear layer."""
    with torch.no_grad():
        shape = module.weight.shape
        if is_transposed(module):
            kernel = _turned(kernel.reshape(shape[1], shape[0], *shape[2:]))
        module.weight.copy_(kernel.reshape(shape).to(module.weight.dtype))


def _turned(weight: Tensor) -> Tensor:
    return weight.transpose(0, 1).flip(list(range(2, weight.dim())))


def spread(module: nn.Module, inputs: Tensor) -> Tensor:
    """The map over which the kernel slides: padded, and of a transposed convolution with zeros in between."""
    if has_own_forward(module):
        return padded_map(module, inputs)
    if not is_transposed(module):
        padding = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return F.pad(inputs, padding, mode=mode) if any(padding) else inputs
    sizes = [(size - 1) * step + 1 for size, step in zip(inputs.shape[2:], module.stride, strict=True)]
    wide = inputs.new_zeros(*inputs.shape[:2], *sizes)
    apart: tuple[Any, ...] = (..., *(slice(None, None, step) for step in module.stride))
    wide[apart] = inputs
    sides = zip(module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True)
    pads = [((taps - 1) * far - cut, (taps - 1) * far - cut + more) for taps, far, cut, more in sides]
    return F.pad(wide, [side for pair in reversed(pads) for side in pair])


def steps(module: nn.Module) -> tuple[int, ...]:
    """Distance between neighbouring positions of the kernel on the map of `spread`."""
    return (1,) * len(module.stride) if is_transposed(module) else tuple(module.stride)


def add_to_output(model: nn.Module, layer: str, norm: str, shift: Tensor) -> bool:
    """Adds `shift` [O] to the output of `layer`: in its bias, in the BatchNorm that alone reads it, or in a new bias.

    In evaluation mode BatchNorm subtracts its running mean, so taking the shift from the mean adds it to the output;
    the structure of the network stays as it is.

    Args:
        model: the network, changed in place.
        layer: name of a convolution or linear layer.
        norm: name of the BatchNorm, or "".
        shift: float64 [O].

    Returns:
        Whether the layer has gained a bias.
    """
    module = model.get_submodule(layer)
    with torch.no_grad():
        if module.bias is None and norm:
            mean = model.get_submodule(norm).running_mean
            mean.copy_((mean.double() - shift.to(mean.device)).to(mean.dtype))
            return False
        created = module.bias is None
        if created:
            module.bias = nn.Parameter(module.weight.new_zeros(axes.width(module, "out")))
            module.bias.requires_grad_(module.weight.requires_grad)
        module.bias.copy_((module.bias.double() + shift.to(module.bias.device)).to(module.bias.dtype))
    return created
