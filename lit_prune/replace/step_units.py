"""How far a step moves each parameter: relative to what its layer gives, so that rescaling a unit changes nothing."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_prune.replace.patches import channel_dim
from lit_prune.replace.regression import alive
from lit_prune.running import removing
from lit_prune.structure import axes

TINY = torch.finfo(torch.float32).tiny


def step_units(module: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """Unit of a step for each parameter, of its shape or one that spreads to it.

    A step of one unit changes what the layer gives by about its spread. Of weights `w_oi` of a convolution or a linear
    layer the unit is `s_o / (s_i sqrt(D))`: s_o the standard deviation of the output channel, s_i of the input channel,
    D inputs of an output. Of other parameters with one value a channel it is s_o, of the rest their root mean square.

    Args:
        module: in evaluation mode.
        run: runs it on samples.
    """
    spreads: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str):
        def hook(part: nn.Module, args: tuple, output: Tensor) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                dim = channel_dim(part) if axes.is_weighted(part) else 1 if isinstance(part, axes.BATCH_NORMS) else -1
                spreads[name] = (_variances(args[0].detach(), dim), _variances(output.detach(), dim))

        return hook

    holders = {name: m for name, m in module.named_modules() if next(m.parameters(recurse=False), None) is not None}
    with removing([part.register_forward_hook(note(name)) for name, part in holders.items()]), torch.no_grad():
        run()
    found = {}
    for name, part in holders.items():
        for key, parameter in part.named_parameters(recurse=False):
            full = f"{name}.{key}" if name else key
            found[full] = _rate(part, key, parameter.detach(), *spreads.get(name, (None, None)))
    return found


def _rate(part: nn.Module, key: str, parameter: Tensor, given: Tensor | None, output: Tensor | None) -> Tensor:
    """The spread of the output over that of what the parameter multiplies; else the parameter's own size."""
    if output is not None and given is not None:
        spread = alive(output).sqrt()
        if key == "weight" and axes.is_weighted(part):
            groups, transposed = getattr(part, "groups", 1), getattr(part, "transposed", False)
            kernel = parameter.reshape(groups, len(parameter) // groups, parameter.shape[1], -1)
            kernel = kernel.transpose(1, 2) if transposed else kernel  # [groups, out, in, taps]
            inputs = alive(given, kernel.square().sum((1, 3)).flatten()).sqrt()
            ratio = spread.view(groups, -1, 1) / inputs.view(groups, 1, -1)
            fan_in = kernel.shape[2] * kernel.shape[3]
            ratio = (ratio.transpose(1, 2) if transposed else ratio).flatten(0, 1)
            return ratio.view(*ratio.shape, *[1] * (parameter.ndim - 2)).to(parameter) / math.sqrt(fan_in)
        if parameter.shape == output.shape:
            return spread.to(parameter)
    return parameter.square().mean().sqrt().clamp_min(TINY)


def _variances(values: Tensor, dim: int) -> Tensor:
    """Of each channel, float64."""
    return values.movedim(dim, 0).flatten(1).double().var(1, correction=0)
