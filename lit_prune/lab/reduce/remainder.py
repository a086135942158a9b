"""How far the second-order risk can be from the loss: the third-order remainder of a ReLU network."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.layers import removing
from lit_prune.replace.flow import Flow
from lit_prune.running import undisturbed
from lit_prune.task.batches import to_network

CROSS_ENTROPY = math.sqrt(2) ** 3 / (6 * math.sqrt(3))
"""κ: largest third derivative of log-sum-exp along a unit vector. Along v it is the third central moment of v's entries
under the softmax; these span at most √2, and a variable of range r has at most r³/(6√3)."""


def hessian_lipschitz(model: nn.Module, reader: str, flow: Flow, images: Tensor) -> Tensor:
    """ρ_j ≤ κ · (Π‖W‖₂)³ · ‖W[:,j]‖₂³ of each input channel j of `reader`, the product over the layers behind it.

    It holds within one region of the ReLUs. Norms of convolutions are those of the map on the network's own image size;
    a BatchNorm counts with its largest scale; pooling and ReLU do not stretch.

    Args:
        model: a chain behind `reader`: no addition joins anything there.
        reader: convolution or linear layer.
        flow: of `model`.
        images: [B, C, H, W]; only the first is used.

    Returns:
        float64 [C], on the device of the network.

    Raises:
        InputError: an addition lies behind the reader.

    Source: causal mechanism reduction, theorem 4 (κ: see `CROSS_ENTROPY`).
    """
    order = list(dict.fromkeys(flow.layers))
    place = order.index(reader)
    if any(addition.before > place for addition in flow.additions):
        raise InputError(f"remainder bound: an addition lies behind layer {reader!r}; the product of norms is no bound")
    shapes = _input_shapes(model, order[place:], images[:1])
    stretch = _norm_scale(model, flow.norms, reader)
    for name in order[place + 1 :]:
        stretch *= spectral_norm(model.get_submodule(name), shapes[name]) * _norm_scale(model, flow.norms, name)
    weight = model.get_submodule(reader).weight.detach().double()
    columns = weight.movedim(1, 0).flatten(1).norm(dim=1)  # [C]
    return CROSS_ENTROPY * stretch**3 * columns.pow(3)


def remainder_bound(lipschitz: Tensor, values: Tensor, constants: Tensor) -> Tensor:
    """`ρ/6 · E|c - a|³`, the most by which the risk of each constant differs from the rise of the loss, [C].

    ρ is the `lipschitz` of each input [C], c its constant [C], a its `values` [n, C].

    Source: causal mechanism reduction, proposition 6, before its last inequality.
    """
    return lipschitz / 6 * (constants - values).abs().pow(3).mean(0)


def spectral_norm(module: nn.Module, shape: tuple[int, ...], iterations: int = 100) -> float:
    """Largest singular value of a layer's linear map on inputs of `shape`, by power iteration.

    Args:
        module: Conv2d or Linear.
        shape: of one input without the batch, (C, H, W) or (..., C).
        iterations: at most; it stops when the value has settled to 1e-6.
    """
    vector = torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, last = module.weight.detach().to("cpu", torch.float64), 0.0
    for _ in range(iterations):
        vector = vector / vector.norm()
        vector.requires_grad_()
        with torch.enable_grad():
            image = _linear(module, weight, vector)
            (back,) = torch.autograd.grad(0.5 * image.square().sum(), vector)
        value, vector = float(image.detach().norm()), back
        if abs(value - last) <= 1e-6 * value:
            break
        last = value
    return value


def _linear(module: nn.Module, weight: Tensor, inputs: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        return F.linear(inputs, weight)
    return F.conv2d(inputs, weight, None, module.stride, module.padding, module.dilation, module.groups)


def _norm_scale(model: nn.Module, norms: Mapping[str, str], layer: str) -> float:
    if layer not in norms:
        return 1.0
    norm = model.get_submodule(norms[layer])
    scale = (norm.running_var + norm.eps).rsqrt()
    return float((scale if norm.weight is None else scale * norm.weight.abs()).max().detach())


def _input_shapes(model: nn.Module, layers: list[str], images: Tensor) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def keeper(name: str):
        return lambda module, args: shapes.__setitem__(name, tuple(args[0].shape[1:]))

    handles = [model.get_submodule(name).register_forward_pre_hook(keeper(name)) for name in layers]
    with removing(handles), undisturbed(model):
        model(to_network(images, model))
    return shapes
