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
    sums = torch.zeros(3, dtype=torch.float64)  # correct, summed loss, images
    model.eval()
    try:
        for images, labels in batches:
            labels = labels.to(device)
            logits = model(images.to(device)).double()
            correct = (logits.argmax(1) == labels).sum()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([correct, loss, torch.tensor(len(labels), device=device)]).double().cpu()
    finally:
        for module, mode in modes.items():
            module.training = mode
    sums = sums if reduce is None else reduce(sums)
    if not sums[2]:
        raise InputError("evaluation got no batches: give at least one (images, labels) batch")
    return Evaluation(float(sums[0] / sums[2]), float(sums[1] / sums[2]), int(sums[2]))
