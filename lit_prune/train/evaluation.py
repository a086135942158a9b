"""Accuracy and loss of a network over batches, as sums that add across ranks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_prune.errors import InputError


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`: `accuracy` in 0..1, mean cross-entropy `loss` in nats, number of `images`."""

    accuracy: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], reduce: Callable[[Tensor], Tensor] | None = None
) -> Evaluation:
    """Top-1 accuracy and mean cross-entropy of `model` in eval mode; its modes are as before on return.

    Args:
        model: maps images to logits [B, K].
        batches: `(images, labels)` pairs.
        reduce: sums a float64 tensor over ranks; None where this process holds all images.

    Raises:
        InputError: no batches at all.
    """
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    results = torch.zeros(2, dtype=torch.float64, device=device)  # correct, summed loss
    count = 0
    model.eval()
    try:
        for images, labels in batches:
            labels = labels.to(device, non_blocking=True)
            logits = model(images.to(device, non_blocking=True)).double()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            results += torch.stack([(logits.argmax(1) == labels).sum().double(), loss])
            count += len(labels)
    finally:
        for module, mode in modes.items():
            module.training = mode
    sums = torch.tensor([*results.tolist(), count], dtype=torch.float64)  # the one time that it waits for the device
    sums = sums if reduce is None else reduce(sums)
    if not sums[2]:
        raise InputError("evaluation got no batches: give at least one (images, labels) batch")
    return Evaluation(float(sums[0] / sums[2]), float(sums[1] / sums[2]), int(sums[2]))
