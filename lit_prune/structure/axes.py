"""The channel axes of layers and bare parameters: what sort of layer it is, how wide each axis is."""

from typing import Any

from torch import Tensor, nn

from lit_prune.running import CONVOLUTIONS
from lit_prune.structure.layers import layer_type
from lit_prune.structure.layers.norms import BATCH_NORMS
from lit_prune.structure.layers.weighted import goes_by_group

__all__ = ["BATCH_NORMS", "CONVOLUTIONS", "AxisKey", "goes_by_group"]

AxisKey = tuple[str, str]
"""(qualified name, axis): "out" or "in" of a module or bare parameter, "dim:K" of a tensor, and numbers that a module
states in an attribute: "heads:NAME" of heads, "attribute:NAME" of channels of all heads."""
EVEN = 8
"""Widths that kernels are made for are multiples of it; others may take longer than wider ones."""


def stated(axis: str) -> str:
    """Name of the attribute whose value the axis is, or ""."""
    kind, _, name = axis.partition(":")
    return name if kind in ("heads", "attribute") else ""


def find(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """Module, parameter or buffer of `model` with that qualified name; the model itself for "".

    Raises:
        AttributeError: there is none.
    """
    if not name:
        return model
    parent, _, last = name.rpartition(".")
    return getattr(model.get_submodule(parent), last)


def dim_of(tensor: Tensor, axis: str) -> int:
    """Dimension of a bare tensor along which an axis lies: the one that it says, or the longest."""
    return int(axis[4:]) if axis.startswith("dim:") else max(range(tensor.dim()), key=lambda d: tensor.shape[d])


def is_depthwise(module: object) -> bool:
    """Whether `module` is a convolution with one input and one output channel in each of several groups."""
    return isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.out_channels == module.in_channels


def is_weighted(module: object) -> bool:
    """Whether `module` is a convolution or a linear layer."""
    return isinstance(module, (*CONVOLUTIONS, nn.Linear))


def is_boundary(module: object) -> bool:
    """Whether channels end and begin here: a convolution that mixes channels, a linear layer, a padded shortcut."""
    return _is_of_sort(module, "mixing")


def is_mixing(module: object) -> bool:
    """Whether channels end and begin here in weights: a convolution that mixes channels, a linear layer."""
    kind = layer_type(module)
    return kind is not None and kind.sort == "mixing" and bool(kind.parameters)


def is_channelwise(module: object) -> bool:
    """Whether `module` has weights for each channel and mixes none: depthwise convolution, norm, PReLU.

    The statistics of a GroupNorm mix the channels of a group, so that whole groups of them go.
    """
    return _is_of_sort(module, "channelwise")


def is_layer_norm(module: object) -> bool:
    """Whether `module` takes statistics over all channels and has a scale for each: LayerNorm, RMSNorm, timm's GRN."""
    return _is_of_sort(module, "statistics")


def is_cuttable(module: object) -> bool:
    """Whether `module` is a layer that can lose channels."""
    kind = layer_type(module)
    return kind is not None and kind.sort != "closed"


def _is_of_sort(module: object, sort: str) -> bool:
    kind = layer_type(module)
    return kind is not None and kind.sort == sort


def channel_dim(module: nn.Module, values: Tensor) -> int:
    """Dimension of the channels: last for linear layers, attentions and LayerNorms, else second."""
    kind = layer_type(module)
    return 1 if kind is None else kind.channel_dim(module, values)


def width(module: Any, axis: str) -> int:
    """Number of channels that the attributes of a layer state; for a bare parameter the number of its values."""
    if stated(axis):
        return getattr(module, stated(axis))
    if axis.startswith("dim:"):
        return module.shape[int(axis[4:])]
    kind = layer_type(module)
    return module.numel() if kind is None else kind.width(module, axis)


def stored_width(module: Any, axis: str) -> int:
    """Number of channels that the tensors of a layer have (the attributes' where it has no tensor)."""
    kind = layer_type(module)
    return width(module, axis) if ":" in axis or kind is None else kind.stored(module, axis)
