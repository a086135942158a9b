"""A small network of residual blocks on a trunk."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

TRUNK = 8
"""Channels of the trunk, which each block reads and writes."""


class ResidualNet(nn.Module):
    """Stem, `count` blocks, mean over places, linear head: [B, 3, H, W] to [B, outputs]."""

    def __init__(self, block: Callable[[], nn.Module], count: int, outputs: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, TRUNK, 3, padding=1), nn.Linear(TRUNK, outputs)
        self.blocks = nn.ModuleList(block() for _ in range(count))

    def forward(self, images: Tensor) -> Tensor:
        values = torch.relu(self.stem(images))
        for block in self.blocks:
            values = torch.relu(values + block(values))
        return self.head(values.mean((2, 3)))
