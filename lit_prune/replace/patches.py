"""Rows of a regression at a layer: its input patches, and what its output is to be there."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        module: Conv2d without groups, or Linear.
        inputs: [B, C, H, W], or [B, ..., C] of a Linear.
        chosen: positions [B, n] or None for all.
    """
    if isinstance(module, nn.Linear):
        return _pick(inputs.reshape(len(inputs), -1, inputs.shape[-1]), chosen)  # [B, P, C]
    padding = module._reversed_padding_repeated_twice
    if any(padding):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = F.pad(inputs, padding, mode=mode)
    if chosen is None:
        patches = F.unfold(inputs, module.kernel_size, module.dilation, 0, module.stride)  # [B, C·taps, P]
        return patches.transpose(1, 2).flatten(0, 1)
    images, channels = inputs.shape[:2]
    index = _places(module, inputs, chosen.to(inputs.device)).flatten(1)[:, None]  # [B, 1, n·taps]
    values = inputs.flatten(2).gather(2, index.expand(-1, channels, -1))
    return values.unflatten(2, (chosen.shape[1], -1)).transpose(1, 2).reshape(images * chosen.shape[1], -1)


def _places(module: nn.Conv2d, padded: Tensor, chosen: Tensor) -> Tensor:
    """Where the patches of the chosen positions lie in a padded, flattened map, int64 [B, n, taps]."""
    width = padded.shape[3]
    (rows, columns), (down, right), (tall, wide) = module.kernel_size, module.stride, module.dilation
    across = (width - wide * (columns - 1) - 1) // right + 1  # positions in one row of the output
    corner = (chosen // across) * down * width + (chosen % across) * right
    vertical = torch.arange(rows, device=chosen.device) * tall * width
    horizontal = torch.arange(columns, device=chosen.device) * wide
    return corner[..., None] + (vertical[:, None] + horizontal).flatten()


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
