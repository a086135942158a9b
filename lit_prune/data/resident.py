"""Batches from images in memory, on the training device where they fit, or from worker processes that read files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_prune.data.augmentation import Augmentation, Normalisation, PadCropFlip
from lit_prune.data.sampling import EpochSampler
from lit_prune.data.sources import ImageSource, MemoryImages
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


class BatchDataset(Dataset):
    """Maps a list of `(epoch, index)` pairs to one batch of uint8 pixels [B, C, H, W]; runs inside the workers.

    An InputError is returned, not raised: a worker's exception would arrive with its traceback in the message.
    """

    def __init__(self, source: ImageSource, augmentation: Augmentation | None = None) -> None:
        self.source, self.augmentation = source, augmentation

    def __getitem__(self, items: list[tuple[int, int]]) -> tuple[Tensor, Tensor] | InputError:
        try:
            pixels = torch.stack([self._view(epoch, index) for epoch, index in items])
        except InputError as error:
            return error
        return pixels, self.source.labels[[index for _, index in items]]

    def _view(self, epoch: int, index: int) -> Tensor:
        return self.augmentation.view(self.source, epoch, index) if self.augmentation else self.source.image(index)


class WorkerLoader:
    """Iterable of normalised batches `(images float32 [B, C, H, W], labels int64 [B])` made by worker processes.

    Whole batches are normalised, on `device`: what workers hand over, and what is copied to the device ahead of its
    use, are bytes, a quarter of the floats.

    A torch DataLoader inside, so that Lightning, which rebuilds DataLoaders for prediction and `overfit_batches`,
    leaves the pairs of the sampler alone; it sets the epoch through `sampler`.

    Args:
        dataset: Makes the batches.
        sampler: Pairs of each batch.
        normalisation: Applied last.
        num_workers: Worker processes; 0 works in this process.
        device: Training device; for a CUDA device batches come through page-locked memory, without waiting.
    """

    batch_sampler = None  # Lightning reads it wherever it finds a `sampler`

    def __init__(
        self,
        dataset: BatchDataset,
        sampler: EpochSampler,
        normalisation: Normalisation,
        num_workers: int,
        device: torch.device,
    ) -> None:
        self.sampler, self.normalisation, self.device = sampler, normalisation, device
        self._loader = DataLoader(
            dataset,
            batch_size=None,  # the sampler's items are batches already
            sampler=sampler,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # keeps the global generator untouched
        )

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of the sampler's current epoch. InputError: An image cannot be decoded."""
        for batch in self._loader:
            if isinstance(batch, InputError):
                raise InputError(str(batch))  # raising `batch` itself would tie this frame, and the workers, to it
            pixels, labels = (part.to(self.device, non_blocking=True) for part in batch)
            yield self.normalisation(pixels), labels
