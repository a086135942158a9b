"""The base of all data modules: loaders, the calibration subset, the fingerprint."""

import copy
import math
from functools import cached_property
from typing import Any, Literal, Self, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_prune.arguments import check_counts
from lit_prune.data.augmentation import Augmentation, Normalisation, PadCropFlip
from lit_prune.data.resident import BatchDataset, ResidentLoader, WorkerLoader, choose_place
from lit_prune.data.sampling import EpochSampler, Shard, seeded_generator, stratified_order
from lit_prune.data.sources import MemoryImages, checksums
from lit_prune.data.splits import Splits
from lit_prune.errors import InputError
from lit_prune.preparation import Preparation

Loader = ResidentLoader | WorkerLoader
LARGEST_SIDE = 8192


class ImageData(Splits):
    """Labelled images as batches `(images float32 [B, C, H, W], labels int64 [B])`, normalised.

    A data set implements `load_split` and sets `image_shape`, `classes` and the class attributes below. Every random
    draw is a pure function of `seed`, epoch and image index: batches are the same for any number of workers, two
    ranks serve together what one would, and training resumed at the end of an epoch continues with the same batches.
    Shards follow the trainer's rank and world size; without a trainer there is one shard.

    Attributes:
        num_classes: Number of classes, known from construction on.
        image_shape: `(C, H, W)` of a batch's images, known from construction on.
        mean: Mean of each channel that batches are normalised with.
        std: Standard deviation likewise.
        classes: Class names by label, known after `setup`.

    Args:
        root: Folder that holds the data set.
        download: Fetch the data set into `root` where it is missing.
        batch_size: Training images per batch and device.
        eval_batch_size: Images per batch and device for validation, test, prediction and calibration.
        seed: Seed of the shuffles, augmentation draws and subsets, >= 0.
        train_size: Keep only that many training images, class-balanced; null keeps all.
        val_size: Hold out that many training images, class-balanced, for validation; with 0 validation uses the
            official validation split, or the test split where there is none.
        calibration_size: Images of the fixed calibration subset, at most the training split.
        num_workers: Worker processes, for images that are not kept in memory.
        resident: Keep the images in memory and augment whole batches there: `auto` on the training device where they
            take at most a quarter of its free memory, else in host memory; true on the training device or not at all;
            false leaves the work to worker processes. The batches are the same.
        pad: Pixels added on every side before training images are cut out.
        padding: What is added: `zero` (before normalisation) or `reflect`.
        flip: Whether half of the training images are mirrored.
        mean: Mean of each channel on the scale 0..1 in place of the data set's, such as that of pretrained weights.
        std: Standard deviation likewise.
    """

    CLASSES = 0
    MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet
    STD: tuple[float, ...] = (0.229, 0.224, 0.225)

    image_shape: tuple[int, int, int]

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        seed: int = 0,
        train_size: int | None = None,
        val_size: int = 0,
        calibration_size: int = 5000,
        num_workers: int = 4,
        resident: Literal["auto"] | bool = "auto",
        pad: int = 4,
        padding: Literal["zero", "reflect"] = "zero",
        flip: bool = True,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.root, self.download, self.seed = root, download, seed
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.train_size, self.val_size, self.calibration_size = train_size, val_size, calibration_size
        self.resident, self.pad, self.padding, self.flip = resident, pad, padding, flip
        self.mean, self.std = tuple(mean or self.MEAN), tuple(std or self.STD)
        self.classes: tuple[str, ...] = ()
        self.num_classes = self.CLASSES
        self._placed: dict[tuple[str, str], MemoryImages] = {}
        self._said = False
        self._check_arguments()

    def _check_arguments(self) -> None:
        least = {"batch_size": 1, "eval_batch_size": 1, "calibration_size": 1, "train_size": 1}
        least |= {"seed": 0, "val_size": 0, "num_workers": 0, "pad": 0}
        check_counts(self, least, "{name}={value}")
        if (
            len(self.mean) != len(self.std)
            or not min(self.std) > 0
            or not all(map(math.isfinite, self.mean + self.std))
        ):
            raise InputError(f"mean={self.mean} and std={self.std} need one value a channel each, std above 0")

    def _check_shape(self) -> None:
        channels, *sides = self.image_shape
        if not 1 <= min(sides) <= max(sides) <= LARGEST_SIDE:
            raise InputError(f"resolution={max(sides)} must lie in 1 to {LARGEST_SIDE}")
        if len(self.mean) != channels:
            raise InputError(f"mean={self.mean} has {len(self.mean)} value(s), the images {channels} channel(s)")
        if self.pad > 4 * max(sides):
            raise InputError(f"pad={self.pad} is more than the images of {sides} themselves; use less")
        if self.padding == "reflect" and self.pad >= min(sides):
            raise InputError(f"pad={self.pad} is too large to reflect images of {sides}; use at most {min(sides) - 1}")

    def _shard(self) -> Shard:
        return Shard(self.trainer.global_rank, self.trainer.world_size) if self.trainer else Shard()

    def _device(self) -> torch.device:
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        return device if device.type == "cuda" else torch.device("cpu")

    def _loader(self, split: str, sampler: EpochSampler, augmentation: Augmentation | None = None) -> Loader:
        images = self._placed_images(split)
        normalisation = Normalisation(self.mean, self.std)
        if images is not None:
            batchwise = cast("PadCropFlip | None", augmentation)  # what works on single files alone is not for these
            return ResidentLoader(images, sampler, normalisation, batchwise)
        dataset = BatchDataset(self._source(split), augmentation)
        return WorkerLoader(dataset, sampler, normalisation, self.num_workers, self._device())

    def _placed_images(self, split: str) -> MemoryImages | None:
        """Images of the split on the device that holds them; None where workers make the batches."""
        source, device, split = self._source(split), self._device(), self._stored_as(split)
        if (split, str(device)) not in self._placed:
            here = isinstance(source, MemoryImages) and device.type == "cpu"  # already there, nothing to allocate
            place = choose_place(0 if here else source.bytes, device, self.resident)
            if place is None:
                return None
            loaded = self._sources[split] = source.load()
            rank_zero_info(f"{split} images in memory: {loaded.bytes / 2**20:.1f} MiB on {place}")
            self._placed[split, str(device)] = loaded.to(place)
        return self._placed[split, str(device)]

    def augmentation(self, stream: str) -> Augmentation:
        """The random views of the training images; `stream` names the purpose, other purposes draw independently."""
        count = len(self._source("train").labels)
        return PadCropFlip(count, self.seed, stream, self.pad, self.padding, self.flip)

    def train_dataloader(self) -> Loader:
        """Augmented training batches of this rank, in an order of their own each epoch (fixed with overfit_batches)."""
        indices = torch.arange(len(self._source("train").labels))
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        sampler = EpochSampler(indices, self.batch_size, shuffle, self.seed, "train", self._shard())
        return self._loader("train", sampler, self.augmentation("train"))

    def _exact_loader(self, split: str) -> Loader:
        indices = torch.arange(len(self._source(split).labels))
        return self._loader(split, EpochSampler(indices, self.eval_batch_size, shuffle=False, shard=self._shard()))

    def val_dataloader(self) -> Loader:
        """Validation batches of this rank; over all ranks every image comes exactly once.

        Says so where they are those of the test split.
        """
        if self.validation_split == "test" and not self._said:
            self._said = True
            rank_zero_info(
                "validation reads the test split: figures that something was chosen by (a tolerance, a best checkpoint)"
                " are too good; --data.val_size N holds out training images"
            )
        return self._exact_loader("val")

    def test_dataloader(self) -> Loader:
        """Test batches of this rank; over all ranks every image comes exactly once."""
        return self._exact_loader("test")

    def predict_dataloader(self) -> Loader:
        """The test batches, labels included."""
        return self._exact_loader("test")

    def subset_dataloader(self, split: str, limit: int | None = None) -> Loader:
        """The first `limit` images of a class-balanced order of a split (None: all), unaugmented, alike on every rank.

        Args:
            split: one of `available_splits`.
            limit: number of images; more than there are takes all.
        """
        order = stratified_order(self._source(split).labels, seeded_generator(self.seed, "subset", split))[:limit]
        return self._loader(split, EpochSampler(order, self.eval_batch_size, shuffle=False))

    def redrawn(self, seed: int) -> Self:
        """The same splits, but calibration images, training order and augmentation are drawn with `seed`."""
        self._source("train")  # the split itself stays the one of the old seed
        other = copy.copy(self)
        other.seed = seed
        other.__dict__.pop("_calibration_order", None)
        return other

    @cached_property
    def _calibration_order(self) -> Tensor:
        order = stratified_order(self._source("train").labels, seeded_generator(self.seed, "calibration"))
        return order[: self.calibration_size]

    @property
    def calibration_indices(self) -> list[int]:
        """Positions of the calibration images in the official training split, ascending."""
        order = self._calibration_order
        return sorted(self.train_positions[order].tolist())

    def calibration_dataloader(self) -> Loader:
        """The fixed calibration images, unaugmented: the same images in the same order on every rank.

        Their order is class-balanced throughout, so the first batches alone are a balanced subset as well.
        """
        sampler = EpochSampler(self._calibration_order, self.eval_batch_size, shuffle=False)
        return self._loader("train", sampler)

    def recalibration_dataloader(self) -> Loader:
        """One pass over augmented training images in random order, the same on every rank and in every epoch."""
        indices = torch.arange(len(self._source("train").labels))
        batch_size = min(self.batch_size, len(indices))
        sampler = EpochSampler(indices, batch_size, shuffle=True, seed=self.seed, stream="recalibration")
        return self._loader("train", sampler, self.augmentation("recalibration"))

    @property
    def short_side(self) -> int:
        """Length to which the short side of an image is resized before the centre is cut out."""
        return min(self.image_shape[1:])

    @property
    def preparation(self) -> Preparation | None:
        """How an image file becomes what the network reads, and the names of the classes; known after `setup`."""
        order = "grey" if len(set(self.mean)) == 1 else "RGB"
        return Preparation(self.mean, self.std, self.image_shape[1:], self.short_side, order, classes=self.classes)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data: name, sizes, sha256 of labels and of a fixed sample of pixels, normalisation."""
        sources = {split: self._source(split) for split in self.available_splits}
        return {
            "name": type(self).__name__,
            "sizes": {split: len(source.labels) for split, source in sources.items()},
            **checksums(sources.values()),
            "image_shape": list(self.image_shape),
            "normalisation": {"mean": list(self.mean), "std": list(self.std)},
        }
