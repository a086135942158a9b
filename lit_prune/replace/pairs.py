"""Pairs of samples that lend each other the values of units."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_prune.arguments import check_seeds, checked
from lit_prune.errors import InputError
from lit_prune.measurement.layers import Batches
from lit_prune.structure.example import Example
from lit_prune.task import Task


@checked
@dataclass(frozen=True)
class Swaps:
    """Which interventions are made.

    Attributes:
        pairs: number R of (base, source) pairs, drawn with replacement; the two images differ.
        probability: chance p that a kept unit is taken from the source.
        images: most images the pairs are drawn from.
        batch_size: pairs that run together.
        seed: of pairs and masks.
    """

    pairs: int = 2000
    probability: float = 0.5
    images: int = 2000
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges. InputError: a value outside its range."""
        if self.pairs < 1 or self.images < 2 or self.batch_size < 1:
            raise InputError(f"pairs={self.pairs} and batch_size must be at least 1, images={self.images} at least 2")
        check_seeds(self.seed)
        if not 0 <= self.probability <= 1:
            raise InputError(f"probability={self.probability} must lie in [0, 1]")


@dataclass(frozen=True)
class Pool:
    """Samples that can be picked one by one: what the networks are called with.

    Attributes:
        args: tensors given by position, each [n, ...].
        kwargs: tensors given by name.
        task: what a batch and an output mean.
    """

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    task: Task

    def __len__(self) -> int:
        return len(next(iter((*self.args, *self.kwargs.values()))))

    def take(self, chosen: Sequence[int] | Tensor) -> Example:
        """The chosen samples."""
        return Example(tuple(v[chosen] for v in self.args), {name: v[chosen] for name, v in self.kwargs.items()})


def gather_images(batches: Batches, limit: int, task: Task) -> Pool:
    """The first `limit` samples.

    Raises:
        InputError: there are fewer than two, or they cannot be put together (lists, other sizes).
    """
    parts, count = [], 0
    for batch in batches:
        parts.append(task.inputs(task.take(batch, limit - count)))
        count += task.size(batch)
        if count >= limit:
            break
    if count < 2:
        raise InputError(f"batches: {min(count, limit)} images, an interchange needs at least two")
    try:
        args = tuple(map(torch.cat, zip(*(part.args for part in parts), strict=True)))
        kwargs = {name: torch.cat([part.kwargs[name] for part in parts]) for name in parts[0].kwargs}
    except (TypeError, RuntimeError, ValueError) as error:
        raise InputError(f"batches: samples of several batches cannot be put together for swaps ({error})") from error
    return Pool(args, kwargs, task)


def draw_pairs(images: int, units: int, swaps: Swaps) -> tuple[Tensor, Tensor, Tensor]:
    """Base and source indices [R] and masks [R, units]; base and source differ."""
    generator = torch.Generator().manual_seed(swaps.seed)
    base = torch.randint(images, (swaps.pairs,), generator=generator)
    source = (base + torch.randint(1, images, (swaps.pairs,), generator=generator)) % images
    mask = torch.rand(swaps.pairs, units, generator=generator) < swaps.probability
    return base, source, mask
