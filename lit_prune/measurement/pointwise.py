"""Layers that do the same at every position, read at their inputs where that is cheaper."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_prune.measurement.moments import Moments

WIDER = 2  # outputs per input from which a layer y = W·x + b is read at its input


@dataclass
class Source:
    """A layer y = W·x + b, the same at every position, that is read at its input: Σ_y = W·Σ_x·Wᵀ.

    Products then cost (C/N)² of the layer's own, and in float64 they are exact however much W cancels.

    Attributes:
        weight: W, float64 [N, C].
        bias: b, float64 [N].
        state: of the parameters that they were copied from, see `weight_state`.
        inputs: moments of x.
        pooled: moments of its means over positions, one sample an image, around the same shift.
    """

    weight: Tensor
    bias: Tensor
    state: tuple[int, ...]
    inputs: Moments
    pooled: Moments

    @classmethod
    def of(cls, module: nn.Module, values: Tensor) -> Source:
        """Of the layer as it is now, around its first inputs [B, P, C]."""
        weight = module.weight.detach().flatten(1).to(torch.float64, copy=True)
        bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().to(weight, copy=True)
        inputs = Moments.around(values, torch.float64)
        return cls(weight, bias, weight_state(module), inputs, inputs.empty())

    def outputs(self, means: Tensor, shift: Tensor) -> Tensor:
        """Means of the outputs around `shift` [N] from those of the inputs around theirs, [B, N]."""
        return means @ self.weight.T + (self.weight @ self.inputs.shift + self.bias - shift)


def pointwise_input(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
    """The layer's input, at the places of its output, if W·x + b of it is the output exactly; None where it is not.

    So it is for an unpadded 1×1 convolution without groups and for a Linear, in full precision and as PyTorch has them,
    with no other hook that may have changed the output. None as well where the outputs are less than twice the inputs.
    """
    if type(module) not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) or len(inputs) != 1:
        return None
    source, weight = inputs[0], module.weight
    full = source.dtype == weight.dtype == output.dtype and weight.dtype in (torch.float32, torch.float64)
    if not full or len(weight) < WIDER * weight.shape[1] or len(module._forward_hooks) > 1:
        return None
    if isinstance(module, nn.Linear):
        return source
    one = weight[0, 0].numel() == 1 and module.groups == 1
    if not one or (module.padding not in ("valid", "same") and any(module.padding)):
        return None
    return source[(..., *(slice(None, None, step) for step in module.stride))]


def weight_state(module: nn.Module) -> tuple[int, ...]:
    """What changes when the layer's parameters are replaced or written to."""
    own = [parameter for parameter in (module.weight, module.bias) if parameter is not None]
    return tuple(number for p in own for number in (p.data_ptr(), 0 if p.is_inference() else p._version))
