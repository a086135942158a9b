"""The fixed, class-balanced order from which the calibration subset and the held-out images are taken."""

import torch
from torch import Tensor


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Random order of the images in which every prefix is as class-balanced as the class sizes allow.

    The images of each class are shuffled and numbered 0, 1, 2, ...; the order sorts by that number, ties at random. So
    among the first n images no class has two more than another that still has images left, and subsets are nested.

    Args:
        labels: Class of each image, int64 [N].
        generator: Source of the shuffles.

    Returns:
        A permutation of 0..N-1, int64 [N].
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = torch.argsort(labels[shuffled], stable=True)  # [N] positions in `shuffled`, class after class
    counts = torch.bincount(labels)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rank = torch.empty_like(by_class)
    rank[by_class] = torch.arange(len(labels)) - starts  # number of the image within its class
    return shuffled[torch.argsort(rank, stable=True)]
