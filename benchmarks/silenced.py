"""A reference for cut networks that knows nothing of groups: the dense network, silent where the cut one has lost."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, nn.Linear)


def tensors(output: object) -> list[Tensor]:
    """The floating-point tensors of an output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def answer(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Outputs in evaluation mode."""
    with torch.no_grad():
        torch.manual_seed(0)
        return tensors(model.eval()(images))


def inputs_lost(dense: nn.Module, small: nn.Module) -> list[int]:
    """Input channels of a layer that the cut one has no longer, found by the values of its weights."""
    transposed = int(getattr(dense, "transposed", False))
    whole, left = (m.weight.detach().transpose(0, 1) if transposed else m.weight.detach() for m in (dense, small))
    whole, left = (w.reshape(*w.shape[:2], -1) for w in (whole, left))
    groups, left_groups = (getattr(m, "groups", 1) for m in (dense, small))
    if whole.shape == left.shape:
        return []
    values, order = whole.flatten().sort()
    rows, columns = whole.shape[0] // groups, whole.shape[1]  # rows (outputs) of each group, inputs of each group
    kept = set()
    for group in range(left_groups):
        first = group * (left.shape[0] // left_groups)
        for column in range(left.shape[1]):
            kept.add(_origin(left[first : first + 4, column].flatten()[:24], values, order, whole.shape, rows))
    return sorted(set(range(groups * columns)) - kept)


def _origin(probes: Tensor, values: Tensor, order: Tensor, shape: torch.Size, rows: int) -> int:
    """Input channel from which these weights of one input channel come; raises where they are nobody's."""
    found: set[int] | None = None
    for value in probes:
        low, high = (int(torch.searchsorted(values, value, right=right)) for right in (False, True))
        places = order[low : min(high, low + 4096)]
        row, column = places // (shape[1] * shape[2]), places // shape[2] % shape[1]
        here = set((row // rows * shape[1] + column).tolist())
        found = here if found is None else found & here
        if len(found) == 1:
            return found.pop()
    raise AssertionError("the weights of the cut network are not those of the dense one")


@contextlib.contextmanager
def silenced(dense: nn.Module, small: nn.Module) -> Iterator[None]:
    """The dense network with zeros in the weights that read an input channel which the cut network has lost.

    In the weights, not in what is read: layers whose weights a function uses (the projection of torchvision's Swin) are
    not called.
    """
    left, before = dict(small.named_modules()), []
    for name, module in dense.named_modules():
        depthwise = 1 < getattr(module, "groups", 1) == getattr(module, "out_channels", 0)
        if not isinstance(module, LAYERS) or name not in left or depthwise:
            continue
        if gone := inputs_lost(module, left[name]):
            before.append((module.weight, module.weight.detach().clone()))
            module.weight.data.mul_(reads(module, gone))
    try:
        yield
    finally:
        for weight, values in before:
            weight.data.copy_(values)


def reads(module: nn.Module, gone: list[int]) -> Tensor:
    """1 for the weights of a layer that read inputs which are left, 0 for those that read the inputs `gone`."""
    mask, groups = torch.ones_like(module.weight), getattr(module, "groups", 1)
    if getattr(module, "transposed", False):
        mask[gone] = 0
        return mask
    rows, columns = len(mask) // groups, mask.shape[1]
    for place in gone:
        group, column = divmod(place, columns)
        mask[group * rows : (group + 1) * rows, column] = 0
    return mask


def gap(dense: nn.Module, small: nn.Module, images: Tensor) -> float:
    """Largest difference from the silenced network, relative to its largest output."""
    with silenced(dense, small):
        expected = answer(dense, images)
    pairs = zip(expected, answer(small, images), strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in pairs)
