"""Which images go into which batch of which epoch on which rank."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lit_prune.data.seeding import seeded_generator
from lit_prune.errors import InputError


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
