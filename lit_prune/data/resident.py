"""Batches from images that live in memory, on the training device where they fit, augmented there as a whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lit_prune.data.augmentation import Normalisation, PadCropFlip
from lit_prune.data.sampling import EpochSampler
from lit_prune.data.sources import MemoryImages
from lit_prune.errors import InputError

FREE_SHARE = 0.25  # of the free memory that "auto" may take: activations need the rest
MEBIBYTE = 2**20


class ResidentLoader:
    """Iterable of normalised batches `(images float32 [B, C, H, W], labels int64 [B])` on the device of `images`.

    Lightning takes it as it is, neither wrapping nor sharding it, and sets the epoch through `sampler`.

    Args:
        images: The split.
        sampler: Indices of each batch.
        normalisation: Applied last.
        augmentation: Applied to whole batches; None serves the images as they are.
    """

    batch_sampler = None  # Lightning reads it wherever it finds a `sampler`

    def __init__(
        self,
        images: MemoryImages,
        sampler: EpochSampler,
        normalisation: Normalisation,
        augmentation: PadCropFlip | None = None,
    ) -> None:
        self.images, self.sampler = images, sampler
        self.normalisation, self.augmentation = normalisation, augmentation

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of the sampler's current epoch."""
        device = self.images.pixels.device
        order = self.sampler.order().to(device)  # one transfer an epoch instead of one a batch
        draws = self.augmentation.draws(self.sampler.epoch).to(device) if self.augmentation else None
        for indices in order.split(self.sampler.sizes):
            pixels = self.images.pixels[indices]
            if self.augmentation is not None and draws is not None:
                pixels = self.augmentation.apply(pixels, draws[indices])
            yield self.normalisation(pixels), self.images.labels[indices]


def free_bytes(device: torch.device) -> int:
    """Free memory of `device` in bytes; of the host where it is no CUDA device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return available[0] if available else 2**62  # unknown: leave it to the operating system


def choose_place(needed: int, device: torch.device, resident: Literal["auto"] | bool) -> torch.device | None:
    """Device whose memory holds the images; None where they stay in files or with the workers.

    Args:
        needed: Bytes to be allocated.
        device: Training device.
        resident: `"auto"`: the training device where the images take at most a quarter of its free memory, else host
            memory under the same rule; True: the training device; False: None.

    Raises:
        InputError: `resident` is True and the free memory does not suffice.
    """
    if resident is False:
        return None
    free = free_bytes(device)
    if resident is True and needed > free:
        raise InputError(
            f"resident=true needs {needed / MEBIBYTE:.0f} MiB on {device}, {(needed - free) / MEBIBYTE:.0f} MiB more"
            " than is free; set resident to auto or false, or train_size to fewer images"
        )
    if resident is True or needed <= FREE_SHARE * free:
        return device
    return None if device.type == "cpu" else choose_place(needed, torch.device("cpu"), "auto")
