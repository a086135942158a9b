"""Torch-Pruning's layer functions, and ours for layers that it does not know. Importing it takes seconds (timm)."""

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from lit_prune.structure import axes
from lit_prune.structure.axes import PaddedShortcut
from lit_prune.structure.tracing import without

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_pruning as tp


class ShortcutPruner(tp.pruner.function.BasePruningFunc):
    """Tells Torch-Pruning that the two sides of a `PaddedShortcut` lose channels independently."""

    def prune_out_channels(self, layer: PaddedShortcut, idxs: Sequence[int]) -> nn.Module:
        """Cuts its output side."""
        layer.prune_out(idxs)
        return layer

    def prune_in_channels(self, layer: PaddedShortcut, idxs: Sequence[int]) -> nn.Module:
        """Cuts its input side."""
        layer.prune_in(idxs)
        return layer

    def get_out_channels(self, layer: PaddedShortcut) -> int:
        """Width of its output."""
        return layer.out_channels

    def get_in_channels(self, layer: PaddedShortcut) -> int:
        """Width of its input."""
        return layer.in_channels


class FrozenNormPruner(tp.pruner.function.BasePruningFunc):
    """Cuts the buffers of a norm that does not train; its two sides are one."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Takes positions out of every buffer."""
        kept = torch.ones(len(layer.weight), dtype=torch.bool, device=layer.weight.device)
        kept[list(idxs)] = False
        for key in axes.FROZEN_NORM:
            setattr(layer, key, getattr(layer, key)[kept])
        if hasattr(layer, "num_features"):
            layer.num_features = len(layer.weight)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> int:
        """Its width."""
        return len(layer.weight)

    get_in_channels = get_out_channels


class GroupNormPruner:
    """Takes whole groups out of a GroupNorm."""

    def prune_out_channels(self, layer: nn.GroupNorm, idxs: Sequence[int]) -> nn.Module:
        """Cuts scale and shift, and counts the groups that are left."""
        width = layer.num_channels // layer.num_groups
        for key in ("weight", "bias"):
            if getattr(layer, key) is not None:
                setattr(layer, key, without(getattr(layer, key), idxs, 0))
        layer.num_channels -= len(idxs)
        layer.num_groups = layer.num_channels // width
        return layer

    prune_in_channels = prune_out_channels


class GroupedPruner:
    """Takes whole groups out of a grouped convolution, or the same places out of every group."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Cuts kernels."""
        for key in ("weight", "bias"):
            if getattr(layer, key) is not None:
                setattr(layer, key, without(getattr(layer, key), idxs, 0))
        layer.out_channels -= len(idxs)
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Counts the groups that are left, or cuts the kernels' inputs."""
        width = layer.in_channels // layer.groups
        if axes.goes_by_group(layer):
            layer.groups -= len(idxs) // width
        else:
            layer.weight = without(layer.weight, sorted({place % width for place in idxs}), 1)
        layer.in_channels -= len(idxs)
        return layer


def _is_grouped(module: object) -> bool:
    return isinstance(module, axes.CONVOLUTIONS) and module.groups > 1 and not module.transposed


CUTTERS = (  # (whether it fits a module, Torch-Pruning's layer functions)
    (axes.is_frozen_norm, FrozenNormPruner()),
    (axes.is_depthwise, tp.pruner.function.DepthwiseConvPruner()),
    (_is_grouped, GroupedPruner()),
    (lambda module: isinstance(module, nn.GroupNorm), GroupNormPruner()),
    (lambda module: isinstance(module, axes.CONVOLUTIONS), tp.pruner.function.ConvPruner()),
    (lambda module: isinstance(module, nn.Linear), tp.pruner.function.LinearPruner()),
    (lambda module: isinstance(module, axes.BATCH_NORMS), tp.pruner.function.BatchnormPruner()),
    (lambda module: isinstance(module, axes.INSTANCE_NORMS), tp.pruner.function.InstanceNormPruner()),
    (lambda module: isinstance(module, nn.PReLU), tp.pruner.function.PReLUPruner()),
    (lambda module: isinstance(module, PaddedShortcut), ShortcutPruner()),
)
