"""The shift of a layer's affine map, put where there is room for it."""

import torch
from torch import Tensor, nn

from lit_prune.structure import axes


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
