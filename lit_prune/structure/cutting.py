"""Takes channels out of single layers, by Torch-Pruning's layer functions."""

import torch
from torch import Tensor, nn

from lit_prune.structure import axes
from lit_prune.structure.opened import open_layer
from lit_prune.structure.tracing import without


def cut_layer(model: nn.Module, name: str, axis: str, positions: list[int]) -> None:
    """Removes positions from one axis of one layer or bare parameter; flags and memory format stay."""
    from lit_prune.structure.pruners import CUTTERS

    target = axes.find(model, name)
    if axes.stated(axis):
        setattr(open_layer(target), axes.stated(axis), axes.width(target, axis) - len(positions))
        return
    holder = model.get_submodule(name.rpartition(".")[0]) if isinstance(target, Tensor) else target
    before = dict(holder.named_parameters(recurse=False))
    if holder is target:
        cutter = next(cutter for fits, cutter in CUTTERS if fits(target))
        (cutter.prune_out_channels if axis == "out" else cutter.prune_in_channels)(target, positions)
    else:
        longest = max(range(target.dim()), key=lambda d: target.shape[d])
        dim = int(axis[4:]) if axis.startswith("dim:") else longest
        setattr(holder, name.rpartition(".")[2], without(target, positions, dim))
    for key, parameter in holder.named_parameters(recurse=False):
        parameter.requires_grad_(before[key].requires_grad)
        if _is_channels_last(before[key]):
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _is_channels_last(tensor: Tensor) -> bool:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()
