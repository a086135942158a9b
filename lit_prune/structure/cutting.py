"""Takes channels out of single layers and bare parameters: weights, gradients, statistics, attributes of a width."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_prune.structure import axes
from lit_prune.structure.opened import open_layer
from lit_prune.structure.tracing import without

_NORM = ("weight", "bias", "running_mean", "running_var")


def cut_layer(model: nn.Module, name: str, axis: str, positions: list[int]) -> None:
    """Removes positions from one axis of one layer or bare parameter; flags and memory format stay."""
    target = axes.find(model, name)
    if axes.stated(axis):
        setattr(open_layer(target), axes.stated(axis), axes.width(target, axis) - len(positions))
        return
    around = model.get_submodule(name.rpartition(".")[0])
    if around is not model:
        open_layer(around)  # an attention whose width changes
    holder = around if isinstance(target, Tensor) else target
    before = dict(holder.named_parameters(recurse=False))
    if holder is target:
        next(cut for fits, cut in _CUTS if fits(target))(target, axis, positions)
    else:
        longest = max(range(target.dim()), key=lambda d: target.shape[d])
        dim = int(axis[4:]) if axis.startswith("dim:") else longest
        setattr(holder, name.rpartition(".")[2], without(target, positions, dim))
    for key, parameter in holder.named_parameters(recurse=False):
        parameter.requires_grad_(before[key].requires_grad)
        if _is_channels_last(before[key]):
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _drop(layer: nn.Module, keys: Sequence[str], positions: Sequence[int], dim: int = 0) -> None:
    """Takes positions out of the tensors of a layer that has them."""
    for key in keys:
        if getattr(layer, key, None) is not None:
            setattr(layer, key, without(getattr(layer, key), positions, dim))


def _convolution(layer: nn.Module, axis: str, positions: Sequence[int]) -> None:
    if axis == "out":
        _drop(layer, ("weight",), positions, 1 if layer.transposed else 0)
        _drop(layer, ("bias",), positions)
        layer.out_channels -= len(positions)
    else:
        _drop(layer, ("weight",), positions, 0 if layer.transposed else 1)
        layer.in_channels -= len(positions)


def _depthwise(layer: nn.Module, axis: str, positions: Sequence[int]) -> None:
    _drop(layer, ("weight", "bias"), positions)
    layer.in_channels = layer.out_channels = layer.groups = layer.groups - len(positions)


def _grouped(layer: nn.Module, axis: str, positions: Sequence[int]) -> None:
    """Whole groups, or the same places of every group (`axes.goes_by_group`)."""
    if axis == "out":
        _drop(layer, ("weight", "bias"), positions)
        layer.out_channels -= len(positions)
        return
    width = layer.in_channels // layer.groups
    if axes.goes_by_group(layer):
        layer.groups -= len(positions) // width
    else:
        _drop(layer, ("weight",), sorted({place % width for place in positions}), 1)
    layer.in_channels -= len(positions)


def _linear(layer: nn.Linear, axis: str, positions: Sequence[int]) -> None:
    if axis == "out":
        _drop(layer, ("weight", "bias"), positions)
        layer.out_features -= len(positions)
    else:
        _drop(layer, ("weight",), positions, 1)
        layer.in_features -= len(positions)


def _norm(layer: nn.Module, axis: str, positions: Sequence[int]) -> None:
    _drop(layer, _NORM, positions)
    if hasattr(layer, "num_features"):
        layer.num_features -= len(positions)


def _group_norm(layer: nn.GroupNorm, axis: str, positions: Sequence[int]) -> None:
    """Whole groups."""
    width = layer.num_channels // layer.num_groups
    _drop(layer, _NORM, positions)
    layer.num_channels -= len(positions)
    layer.num_groups = layer.num_channels // width


def _layer_norm(layer: nn.Module, axis: str, positions: Sequence[int]) -> None:
    _drop(layer, _NORM, positions)
    if not axes.is_response_norm(layer):
        layer.normalized_shape = (layer.normalized_shape[0] - len(positions),)


def _prelu(layer: nn.PReLU, axis: str, positions: Sequence[int]) -> None:
    _drop(layer, ("weight",), positions)
    layer.num_parameters -= len(positions)


def _shortcut(layer: axes.PaddedShortcut, axis: str, positions: Sequence[int]) -> None:
    """The two sides lose channels independently."""
    (layer.prune_out if axis == "out" else layer.prune_in)(positions)


_CUTS = (  # (whether it fits a layer, what cuts it)
    (axes.is_depthwise, _depthwise),
    (axes.is_grouped, _grouped),
    (lambda module: isinstance(module, axes.CONVOLUTIONS), _convolution),
    (lambda module: isinstance(module, nn.Linear), _linear),
    (lambda module: isinstance(module, nn.GroupNorm), _group_norm),
    (axes.is_layer_norm, _layer_norm),
    (lambda module: isinstance(module, nn.PReLU), _prelu),
    (lambda module: isinstance(module, axes.PaddedShortcut), _shortcut),
    (lambda module: True, _norm),
)


def _is_channels_last(tensor: Tensor) -> bool:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()
