"""Batches from worker processes, one image at a time: for images that stay in files."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_prune.data.augmentation import Augmentation, Normalisation
from lit_prune.data.sampling import EpochSampler
from lit_prune.data.sources import ImageSource
from lit_prune.errors import InputError


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
        """Yields the batches of the sampler's current epoch.

        Raises:
            InputError: An image cannot be decoded.
        """
        for batch in self._loader:
            if isinstance(batch, InputError):
                raise InputError(str(batch))  # raising `batch` itself would tie this frame, and the workers, to it
            pixels, labels = (part.to(self.device, non_blocking=True) for part in batch)
            yield self.normalisation(pixels), labels
