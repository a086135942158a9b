"""A linear layer that reads some of its inputs: for units that cannot leave the network, only this layer's view."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class KeptInputs(nn.Module):
    """`linear(x[..., kept])`: a smaller dense layer behind a gather.

    What is read of a residual trunk is wider than what one reader needs; the trunk's own channels stay for the blocks
    that share them.

    Args:
        kept: input channels read, ascending.
        linear: layer on these channels.
    """

    def __init__(self, kept: Sequence[int], linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("kept", torch.tensor(list(kept)))
        self.linear = linear

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., C] to [..., O]."""
        return self.linear(inputs[..., self.kept])
