"""Takes channels out of single layers and bare parameters: weights, gradients, statistics, attributes of a width."""

import torch
from torch import Tensor, nn

from lit_prune.structure import axes
from lit_prune.structure.layers import layer_type
from lit_prune.structure.opened import open_layer
from lit_prune.structure.tracing import without


def cut_layer(model: nn.Module, name: str, axis: str, positions: list[int]) -> None:
    """Removes positions from one axis of one layer or bare parameter; flags and memory format stay."""
    target = axes.find(model, name)
    if axes.stated(axis) and isinstance(target, nn.Module):
        setattr(open_layer(target), axes.stated(axis), axes.width(target, axis) - len(positions))
        return
    inside = name
    while inside := inside.rpartition(".")[0]:
        open_layer(model.get_submodule(inside))  # an attention whose width changes, a table of its biases
    around = model.get_submodule(name.rpartition(".")[0])
    holder = around if isinstance(target, Tensor) else target
    before = dict(holder.named_parameters(recurse=False))
    if isinstance(target, nn.Module):
        layer = layer_type(target)
        assert layer is not None, f"{name} is a {type(target).__name__}, which no group holds"
        layer.cut(target, axis, positions)
    else:
        setattr(holder, name.rpartition(".")[2], without(target, positions, axes.dim_of(target, axis)))
    for key, parameter in holder.named_parameters(recurse=False):
        parameter.requires_grad_(before[key].requires_grad)
        if _is_channels_last(before[key]):
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _is_channels_last(tensor: Tensor) -> bool:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()
