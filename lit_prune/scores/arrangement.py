"""Orders of removal inside a layer, and scores that follow them. Plain tensors in, plain tensors out."""

import torch
from torch import Tensor


def follow(values: Tensor, order: Tensor) -> Tensor:
    """The values [N] dealt out anew: the smallest to the first channel of `order`, the largest to the last.

    The layer keeps its distribution of values, so a threshold over all layers takes as many channels from it as
    before; only which ones is decided by the order.

    Args:
        values: [N].
        order: channels, first removed first, int64 [N].
    """
    dealt = torch.empty_like(values)
    dealt[order] = values.sort().values
    return dealt
