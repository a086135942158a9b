"""Torch-Pruning's layer functions, and ours for layers that it does not know. Importing it takes seconds (timm)."""

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from lit_prune.structure import axes
from lit_prune.structure.axes import PaddedShortcut

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


CUTTERS = (  # (whether it fits a module, Torch-Pruning's layer functions)
    (axes.is_frozen_norm, FrozenNormPruner()),
    (axes.is_depthwise, tp.pruner.function.DepthwiseConvPruner()),
    (lambda module: isinstance(module, axes.CONVOLUTIONS), tp.pruner.function.ConvPruner()),
    (lambda module: isinstance(module, nn.Linear), tp.pruner.function.LinearPruner()),
    (lambda module: isinstance(module, axes.BATCH_NORMS), tp.pruner.function.BatchnormPruner()),
    (lambda module: isinstance(module, axes.INSTANCE_NORMS), tp.pruner.function.InstanceNormPruner()),
    (lambda module: isinstance(module, nn.PReLU), tp.pruner.function.PReLUPruner()),
    (lambda module: isinstance(module, PaddedShortcut), ShortcutPruner()),
)
