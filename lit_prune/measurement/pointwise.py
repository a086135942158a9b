"""Layers whose output moments are those of a narrower input: y = W·x + b at every position."""

import torch
from torch import Tensor, nn

from lit_prune.measurement.streaming import AffineMap

NARROWER = 2  # outputs per input from which the detour pays
SHARE = 0.2  # of the variance of independent inputs; below, float32 moments of the inputs lose more than about 1e-6
FEWEST_SAMPLES = 16  # to judge that by
MOST_SAMPLES = 2048


def pointwise_input(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
    """The layer's input, at the places of its output, if W·x + b of it is the output exactly; None where it is not.

    So it is for an unpadded 1×1 convolution without groups and for a Linear, in full precision and as PyTorch has them,
    with no other hook that may have changed the output. None as well where the outputs are less than twice the inputs.

    Args:
        module: the layer.
        inputs: positional arguments of its forward.
        output: what that returned.
    """
    plain = type(module) is nn.Linear or (type(module) is nn.Conv2d and _one_by_one(module))
    if not plain or len(inputs) != 1 or len(module._forward_hooks) > 1:
        return None
    source, weight = inputs[0], module.weight
    full = source.dtype == weight.dtype == output.dtype and weight.dtype in (torch.float32, torch.float64)
    if not full or len(weight) < NARROWER * weight.shape[1]:
        return None
    if isinstance(module, nn.Linear):
        return source
    down, across = module.stride
    return source[..., ::down, ::across] if source.ndim == 4 else None


def _one_by_one(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.groups == 1 and conv.padding in ((0, 0), "valid", "same")


def affine_map(module: nn.Module, dtype: torch.dtype) -> AffineMap:
    """The layer's W and b as they are now, in the precision its inputs are to be summed in."""
    bias = None if module.bias is None else module.bias.detach().to(dtype, copy=True)
    return AffineMap(module.weight.detach().flatten(1).to(dtype, copy=True), bias)


def weight_state(module: nn.Module) -> tuple[int, ...]:
    """What changes when the layer's parameters are replaced or written to."""
    own = [parameter for parameter in (module.weight, module.bias) if parameter is not None]
    return tuple(number for p in own for number in (p.data_ptr(), 0 if p.is_inference() else p._version))


def loses_digits(module: nn.Module, source: Tensor, values: Tensor) -> bool:
    """Whether W·Σ·Wᵀ cancels, so that float32 will not do for Σ: some channel varies far less than its parts.

    Both are looked at, the variance over images and positions and that of the means over positions.

    Args:
        module: the layer.
        source: its inputs [B, P, C].
        values: its outputs [B, P, N].
    """
    images, positions, _ = values.shape
    if images == 1 or images * positions < FEWEST_SAMPLES:
        return True
    step = min(-(-images * positions // MOST_SAMPLES), positions)
    squares = module.weight.detach().flatten(1).square()

    def kept(outputs: Tensor, parts: Tensor) -> bool:
        return bool((_variance(outputs) >= SHARE * (squares @ _variance(parts))).all())

    return not (kept(values[:, ::step], source[:, ::step]) and kept(values.mean(1), source.mean(1)))


def _variance(values: Tensor) -> Tensor:
    """Variance [n] over all but the last dimension."""
    flat = values.flatten(0, -2)
    return (flat - flat.mean(0)).square().mean(0)
