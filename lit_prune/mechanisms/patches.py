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
        return torch.rand(images, positions, generator=self.generator).argsort(1)[:, : self.per_image]


def input_rows(module: nn.Module, inputs: Tensor, chosen: Tensor | None) -> Tensor:
    """Patches that a layer reads, [rows, C·taps] in the order of its flattened kernels, zero padding included.

    Args:
        module: Conv2d without groups, or Linear.
        inputs: [B, C, H, W], or [B, ..., C] of a Linear.
        chosen: positions [B, n] or None for all.
    """
    if isinstance(module, nn.Linear):
        rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])  # [B, P, C]
    else:
        padding = module._reversed_padding_repeated_twice
        if any(padding):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            inputs = F.pad(inputs, padding, mode=mode)
        patches = F.unfold(inputs, module.kernel_size, module.dilation, 0, module.stride)  # [B, C·taps, P]
        rows = patches.transpose(1, 2)
    return _pick(rows, chosen)


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
