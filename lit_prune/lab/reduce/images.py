"""The labelled images of a reduction, read from batches by the task of classification."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_prune.data.sampling import stratified_order
from lit_prune.errors import InputError
from lit_prune.task import Classification

Batches = list[Any]  # that `TASK` reads
TASK = Classification()


def gathered(batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """All images [n, C, H, W] and labels [n] of batches, on the CPU."""
    parts = [(TASK.inputs(batch).args[0].cpu(), TASK.target(batch).cpu()) for batch in batches]
    images, labels = (torch.cat(values) for values in zip(*parts, strict=True))
    return images, labels


def in_batches(images: Tensor, labels: Tensor, order: Tensor, size: int) -> Batches:
    """The images that `order` [m] names, `size` to a batch."""
    return [(images[part], labels[part]) for part in order.split(size)]


def first_images(batches: Batches, count: int) -> Tensor:
    """The first images of the first batch, [count, C, H, W] where it has so many."""
    return TASK.inputs(TASK.take(batches[0], count)).args[0]


def evaluation_batches(loader: Iterable[Any], limit: int | None, swapped: int) -> Batches:
    """The batches of a loader on the CPU; where not all images are used, in class-balanced order (folders are sorted).

    Args:
        loader: test batches.
        limit: images at the most.
        swapped: how many of them, from the first on, interchange interventions take.
    """
    batches = list(loader)
    images, labels = gathered(batches)
    order = torch.arange(len(labels))
    if min(limit or len(labels), swapped) < len(labels):
        order = stratified_order(labels, torch.Generator().manual_seed(0))[:limit]
    return in_batches(images, labels, order, TASK.size(batches[0]))


@dataclass(frozen=True)
class Images:
    """Calibration images, from which each seed draws, and test images."""

    calibration: Batches
    test: Batches

    def drawn(self, size: int, classes: tuple[int, ...] | None, seed: int) -> Batches:
        """`size` calibration images of the classes, class-balanced, in batches as large as those given.

        Raises:
            InputError: there are fewer.
        """
        images, labels = gathered(self.calibration)
        chosen = torch.arange(len(labels))
        if classes is not None:
            chosen = chosen[torch.isin(labels, torch.tensor(classes))]
        if len(chosen) < size:
            of = "" if classes is None else f" of classes {list(classes)}"
            raise InputError(
                f"request.calibration_sizes={size}: there are {len(chosen)} calibration images{of}; "
                "raise --data.calibration_size or ask for fewer"
            )
        order = stratified_order(labels[chosen], torch.Generator().manual_seed(seed))[:size]
        return in_batches(images, labels, chosen[order], TASK.size(self.calibration[0]))

    def fingerprint(self) -> dict[str, Any]:
        """What says which images these are: their numbers, labels and the first ones' values."""
        both = (self.calibration, self.test)
        labels = [gathered(part)[1].numpy().tobytes() for part in both]
        pixels = [first_images(part, 8).double().sum().item() for part in both]
        return {"labels": [hashlib.sha256(one).hexdigest() for one in labels], "pixels": pixels}
