"""Takes channels out of single layers, by Torch-Pruning's layer functions."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_prune.structure import axes
from lit_prune.structure.axes import PaddedShortcut
from lit_prune.structure.opened import open_layer

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


_CUTTERS = (
    (axes.is_frozen_norm, FrozenNormPruner()),
    (axes.is_depthwise, tp.pruner.function.DepthwiseConvPruner()),
    (lambda module: isinstance(module, axes.CONVOLUTIONS), tp.pruner.function.ConvPruner()),
    (lambda module: isinstance(module, nn.Linear), tp.pruner.function.LinearPruner()),
    (lambda module: isinstance(module, axes.BATCH_NORMS), tp.pruner.function.BatchnormPruner()),
    (lambda module: isinstance(module, axes.INSTANCE_NORMS), tp.pruner.function.InstanceNormPruner()),
    (lambda module: isinstance(module, nn.PReLU), tp.pruner.function.PReLUPruner()),
    (lambda module: isinstance(module, PaddedShortcut), ShortcutPruner()),
)


def cut_layer(model: nn.Module, name: str, axis: str, positions: list[int]) -> None:
    """Removes positions from one axis of one layer or bare parameter; flags and memory format stay."""
    target = axes.find(model, name)
    if axes.stated(axis):
        setattr(open_layer(target), axes.stated(axis), axes.width(target, axis) - len(positions))
        return
    holder = model.get_submodule(name.rpartition(".")[0]) if isinstance(target, Tensor) else target
    if isinstance(target, Tensor) and not isinstance(target, nn.Parameter):
        setattr(holder, name.rpartition(".")[2], _without(target, int(axis[4:]), positions))
        return
    before = dict(holder.named_parameters(recurse=False))
    if holder is target:
        cutter = next(cutter for fits, cutter in _CUTTERS if fits(target))
        (cutter.prune_out_channels if axis == "out" else cutter.prune_in_channels)(target, positions)
    else:
        longest = max(range(target.dim()), key=lambda d: target.shape[d])
        dim = int(axis[4:]) if axis.startswith("dim:") else longest
        pruner = tp.pruner.function.ParameterPruner(pruning_dim=dim)
        setattr(holder, name.rpartition(".")[2], pruner.prune_out_channels(target, positions))
    for key, parameter in holder.named_parameters(recurse=False):
        parameter.requires_grad_(before[key].requires_grad)
        if _is_channels_last(before[key]):
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _without(tensor: Tensor, dim: int, positions: list[int]) -> Tensor:
    kept = sorted(set(range(tensor.shape[dim])) - set(positions))
    return tensor.index_select(dim, torch.tensor(kept, device=tensor.device))


def _is_channels_last(tensor: Tensor) -> bool:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()
