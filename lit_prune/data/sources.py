"""Images of one split, in memory or in files, before augmentation and normalisation."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image
from rich.progress import track
from torch import Tensor
from torchvision.transforms import v2

from lit_prune.errors import InputError
from lit_prune.image_files import BROKEN_IMAGE, list_images, read_image

SHOW_PROGRESS_FROM = 3000  # files; fewer are decoded within about a second
DECODING_THREADS = 8
FINGERPRINT_IMAGES = 64  # of each split


@dataclass(frozen=True, eq=False)
class MemoryImages:
    """Images as one tensor.

    Attributes:
        pixels: uint8 [N, C, H, W].
        labels: int64 [N].
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def bytes(self) -> int:
        """Memory of the pixels."""
        return self.pixels.numel()

    def load(self) -> "MemoryImages":
        """Itself."""
        return self

    def image(self, index: int) -> Tensor:
        """One image, uint8 [C, H, W]."""
        return self.pixels[index]

    def subset(self, indices: Tensor) -> "MemoryImages":
        """The chosen images only, copied."""
        return MemoryImages(self.pixels[indices], self.labels[indices])

    def to(self, device: torch.device) -> "MemoryImages":
        """The same images on `device`."""
        return MemoryImages(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class FileImages:
    """Images as files, decoded when asked for.

    Attributes:
        files: Path of each image.
        labels: int64 [N].
        resolution: Height and width of a decoded image.
        short_side: Length to which the short side is resized (bilinear, antialiased) before the centre is cut out.
    """

    files: tuple[str, ...]
    labels: Tensor
    resolution: int
    short_side: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def bytes(self) -> int:
        """Memory of the pixels, once decoded."""
        return len(self) * 3 * self.resolution**2

    def open(self, index: int) -> Image.Image:
        """One image as it is stored, converted to RGB."""
        return read_image(self.files[index])

    def image(self, index: int) -> Tensor:
        """One image, resized and cut to the centre, uint8 [3, resolution, resolution]."""
        image = self.open(index)
        if image.size != (self.resolution, self.resolution) or self.short_side != self.resolution:
            image = v2.functional.center_crop(v2.functional.resize(image, [self.short_side]), [self.resolution])
        return v2.functional.pil_to_tensor(image)

    def subset(self, indices: Tensor) -> "FileImages":
        """The chosen files only."""
        files = tuple(self.files[index] for index in indices.tolist())
        return FileImages(files, self.labels[indices], self.resolution, self.short_side)

    def load(self) -> MemoryImages:
        """All images decoded into memory; a bar shows the progress where it lasts.

        Raises:
            InputError: A file is no readable image.
        """
        pixels = torch.empty(len(self), 3, self.resolution, self.resolution, dtype=torch.uint8)
        for index, image in enumerate(self._decoded()):
            pixels[index] = image
        return MemoryImages(pixels, self.labels)

    def _decoded(self) -> Iterator[Tensor]:
        quiet = len(self) < SHOW_PROGRESS_FROM or getattr(rank_zero_only, "rank", 0) != 0
        with ThreadPoolExecutor(DECODING_THREADS) as executor:
            try:
                images = executor.map(self.image, range(len(self)))
                yield from track(images, "decoding images", len(self), disable=quiet)
            finally:
                executor.shutdown(cancel_futures=True)


ImageSource = MemoryImages | FileImages
"""Images of one split with their labels."""

CONVERSIONS = {  # mode of Pillow -> what is done to it
    "L": "grey is repeated in three channels",
    "LA": "grey is repeated in three channels, alpha is dropped",
    "RGBA": "alpha is dropped",
    "CMYK": "CMYK becomes RGB",
    "I;16": "16 bits are rounded to 8, grey is repeated in three channels",
    "I": "16 bits are rounded to 8, grey is repeated in three channels",
}


def describe_conversions(files: Sequence[str], probes: int = 32) -> str:
    """What is done to images that are not square RGB, told from at most `probes` files; "" where nothing is.

    A file that cannot be read is passed over here; decoding it says so.
    """
    said: dict[str, None] = {}
    for file in list(files)[:: max(1, len(files) // probes)][:probes]:
        with suppress(*BROKEN_IMAGE), Image.open(file) as image:
            if image.mode in CONVERSIONS:
                said[CONVERSIONS[image.mode]] = None
            if image.width != image.height:
                said["images that are not square are cut to the centre"] = None
    return "; ".join(said)


def resize_pixels(pixels: Tensor, resolution: int) -> Tensor:
    """Square images resized bilinearly (antialiased), uint8 [N, C, S, S] to [N, C, resolution, resolution]."""
    if pixels.shape[-1] == resolution:
        return pixels
    chunks = (
        F.interpolate(part.float(), (resolution, resolution), mode="bilinear", antialias=True)
        for part in pixels.split(4096)
    )  # in parts, since float takes four times the memory
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in chunks])


def list_folders(folder: str | Path) -> list[str]:
    """Names of the folders in `folder`, sorted, hidden ones left out; empty where there is no such folder."""
    if not os.path.isdir(folder):
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def list_class_folders(folder: str | Path, classes: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """Image files of `folder/<class>/` and the number of each one's class.

    Args:
        folder: Folder with one folder a class; further folders are ignored, and so are classes that are absent.
        classes: Class names; the label is the position here.

    Returns:
        Paths and labels, class after class.

    Raises:
        InputError: A class folder holds no image, or no class folder is there.
    """
    files: list[str] = []
    labels: list[int] = []
    present = set(list_folders(folder))
    for label, name in enumerate(classes):
        images = list_images(os.path.join(folder, name)) if name in present else []
        if name in present and not images:
            raise InputError(f"class folder {os.path.join(folder, name)} holds no image; fill or delete it")
        files += images
        labels += [label] * len(images)
    if not files:
        raise InputError(f"no class folder with images in {folder}; expected {folder}/<class>/<image>")
    return files, labels


def checksums(sources: Iterable[ImageSource]) -> dict[str, str]:
    """sha256 of all labels (`labels_sha256`) and of a fixed sample of pixels (`pixels_sha256`)."""
    labels, pixels = hashlib.sha256(), hashlib.sha256()
    for source in sources:
        labels.update(source.labels.numpy().tobytes())
        for index in torch.linspace(0, len(source.labels) - 1, FINGERPRINT_IMAGES).long().tolist():
            pixels.update(source.image(index).numpy().tobytes())
    return {"labels_sha256": labels.hexdigest(), "pixels_sha256": pixels.hexdigest()}


def check_label_range(labels: Tensor, classes: int, where: str) -> None:
    """Raises InputError unless labels int64 [N] lie within 0 to classes-1."""
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if not 0 <= low <= high < classes:
        raise InputError(
            f"labels of {where} run from {low} to {high}, but the data set has {classes} classes; replace the files"
        )
