"""Which images go into which batch, epoch and rank, and into the calibration subset; seeded by what it is for."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lit_prune.errors import InputError


def seeded_generator(seed: int, *stream: int | str) -> torch.Generator:
    """CPU generator whose state depends on `seed` and `stream` alone, never on the global generator.

    Args:
        seed: The user's seed, >= 0.
        *stream: What the draws are for, such as `"shuffle", epoch`; other streams give independent draws.

    Returns:
        A fresh generator; equal arguments give equal draws on every rank, worker and device.
    """
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in stream]
    state = np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))  # manual_seed takes 63 bits


@dataclass(frozen=True)
class Shard:
    """The part of a global batch that one process works on.

    Attributes:
        rank: Number of this process, 0..world_size-1.
        world_size: Number of processes.
    """

    rank: int = 0
    world_size: int = 1


class EpochSampler(DistributedSampler):
    """Batches of `(epoch, index)` pairs for one rank, a pure function of (seed, stream, epoch, rank, world size).

    Rank r takes the positions r, r + W, r + 2W, ... of the epoch's order, so W ranks with batches of B see together
    exactly the images that one rank with batches of W·B would see.

    Shuffled (training): the order is a permutation drawn from (seed, stream, epoch); what is left after the last full
    global batch is dropped, so every rank has the same number of full batches.
    Not shuffled (evaluation): every index exactly once over all ranks, and the same number of batches on every rank,
    because DistributedDataParallel meets in each forward pass; so the last batch may hold one image more.

    It subclasses torch's DistributedSampler because Lightning leaves such samplers in place.

    Args:
        indices: The images to serve, int64 [N].
        batch_size: Images per batch and rank.
        shuffle: Whether this is the training order.
        seed: Seed of the permutation.
        stream: Purpose; samplers with other streams have independent permutations.
        shard: This process among all.

    Raises:
        InputError: Too few images for one batch on every rank.
    """

    def __init__(
        self,
        indices: Tensor,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        stream: str = "train",
        shard: Shard | None = None,
    ) -> None:
        shard = shard or Shard()
        images = cast("Dataset[int]", range(len(indices)))  # only its length is asked
        super().__init__(images, shard.world_size, shard.rank, shuffle=shuffle, seed=seed)
        self.indices, self.batch_size, self.stream = indices, batch_size, stream
        self.sizes = self._full_batches() if shuffle else self._exact_batches()

    def _full_batches(self) -> list[int]:
        count = len(self.indices) // (self.batch_size * self.num_replicas)
        if not count:
            raise InputError(
                f"batch_size={self.batch_size} on {self.num_replicas} rank(s) needs more than the"
                f" {len(self.indices)} training images; set batch_size to at most"
                f" {len(self.indices) // self.num_replicas} or use fewer devices"
            )
        return [self.batch_size] * count

    def _exact_batches(self) -> list[int]:
        fewest, more = divmod(len(self.indices), self.num_replicas)
        if not fewest:
            raise InputError(
                f"{len(self.indices)} image(s) cannot be spread over {self.num_replicas} ranks; use fewer devices"
            )
        full = -(-fewest // self.batch_size) - 1  # full batches before the last one, equal on every rank
        own = fewest + (self.rank < more)
        return [self.batch_size] * full + [own - full * self.batch_size]

    def order(self) -> Tensor:
        """Indices of this rank in this epoch, in the order served, int64 [sum of `sizes`]."""
        indices = self.indices
        if self.shuffle:
            generator = seeded_generator(self.seed, self.stream, "order", self.epoch)
            indices = indices[torch.randperm(len(indices), generator=generator)]
        return indices[self.rank :: self.num_replicas][: sum(self.sizes)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yields each batch as a list of `(epoch, index)` pairs, so a worker needs no other state to augment."""
        for batch in self.order().split(self.sizes):
            yield [(self.epoch, index) for index in batch.tolist()]

    def __len__(self) -> int:
        """Number of batches of this rank in an epoch."""
        return len(self.sizes)


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Random order of the images in which every prefix is as class-balanced as the class sizes allow, int64 [N].

    The images of each class are shuffled and numbered 0, 1, 2, ...; the order sorts by that number, ties at random. So
    among the first n images no class has two more than another that still has images left, and subsets are nested.
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = torch.argsort(labels[shuffled], stable=True)  # [N] positions in `shuffled`, class after class
    counts = torch.bincount(labels)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rank = torch.empty_like(by_class)
    rank[by_class] = torch.arange(len(labels)) - starts  # number of the image within its class
    return shuffled[torch.argsort(rank, stable=True)]
