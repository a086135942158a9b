"""Rows of a regression at a layer: its input patches, and what its output is to be there."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_prune.replace.kernels import spread, steps


class PositionSample:
    """Which positions of each image are used: all of them, or a seeded sample of `per_image`.

    Args:
        per_image: most positions of one image.
        seed: of the sample.
    """

    def __init__(self, per_image: int, seed: int) -> None:
        self.per_image = max(1, per_image)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, images: int, positions: int) -> Tensor | None:
        """Positions, int64 [images, per_image], without repetition in an image; None for all of them."""
        if positions <= self.per_image:
            return None
        return torch.rand(images, positions, generator=self.generator).topk(self.per_image).indices


def input_rows(module: nn.Module, inputs: Tensor, chosen: Tensor | None) -> Tensor:
    """Patches that a layer reads, [rows, C·taps] in the order of its flattened kernels, zero padding included.

    Args:
        module: a convolution of any kind without groups (see `kernel_of`), or Linear.
        inputs: [B, C, *map], or [B, ..., C] of a Linear.
        chosen: positions [B, n] or None for all.
    """
    if isinstance(module, nn.Linear):
        return _pick(inputs.reshape(len(inputs), -1, inputs.shape[-1]), chosen)  # [B, P, C]
    wide = spread(module, inputs)
    if chosen is None and inputs.dim() == 4:
        patches = F.unfold(wide, module.kernel_size, module.dilation, 0, steps(module))  # [B, C·taps, P]
        return patches.transpose(1, 2).flatten(0, 1)
    index = _places(module, wide, chosen)  # [B or 1, n, taps]
    count, taps = index.shape[1:]
    index = index.flatten(1)[:, None].expand(len(wide), wide.shape[1], -1)
    values = wide.flatten(2).gather(2, index)  # [B, C, n·taps]
    return values.unflatten(2, (count, taps)).transpose(1, 2).reshape(len(wide) * count, -1)


def _places(module: nn.Module, wide: Tensor, chosen: Tensor | None) -> Tensor:
    """Where the patches of the chosen positions lie in a padded, flattened map, int64 [B, n, taps]; all: B is 1."""
    corner, offset = torch.zeros((), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    sides = list(zip(wide.shape[2:], module.kernel_size, module.dilation, steps(module), strict=True))
    counts = [(size - far * (taps - 1) - 1) // step + 1 for size, taps, far, step in sides]
    left = torch.arange(math.prod(counts))[None] if chosen is None else chosen.cpu()  # [B, n], to be taken apart
    stride = 1
    for (size, taps, far, step), count in zip(reversed(sides), reversed(counts), strict=True):
        corner = corner + left % count * step * stride
        offset = ((torch.arange(taps) * far * stride)[:, None] + offset).flatten()
        left, stride = left // count, stride * size
    return (corner[..., None] + offset).to(wide.device)


def output_rows(module: nn.Module, outputs: Tensor, chosen: Tensor | None) -> Tensor:
    """Values of a layer's output (or a tensor shaped like it), [rows, O], at the same positions as `input_rows`."""
    if isinstance(module, nn.Linear):
        return _pick(outputs.reshape(len(outputs), -1, outputs.shape[-1]), chosen)
    return _pick(outputs.flatten(2).transpose(1, 2), chosen)


def channel_dim(module: nn.Module) -> int:
    """Dimension of the channels in a layer's input and output."""
    return -1 if isinstance(module, nn.Linear) else 1


def taken(values: Tensor, channels: Sequence[int], dim: int) -> Tensor:
    """The named channels of `values`, or `values` itself when it has no others."""
    if len(channels) == values.shape[dim]:
        return values
    return values.index_select(dim, torch.tensor(channels, device=values.device))


def _pick(rows: Tensor, chosen: Tensor | None) -> Tensor:
    if chosen is not None:
        index = chosen.to(rows.device)[..., None].expand(-1, -1, rows.shape[2])
        rows = rows.gather(1, index)
    return rows.flatten(0, 1)
