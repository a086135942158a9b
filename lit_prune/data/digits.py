"""Grey images of digits: MNIST, and those that come with scikit-learn and need no file and no network."""

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torchvision
from sklearn.datasets import load_digits
from torch import Tensor

from lit_prune.data.download import no_empty_folder
from lit_prune.data.images import ImageData
from lit_prune.data.sampling import seeded_generator, stratified_order
from lit_prune.data.sources import MemoryImages, resize_pixels
from lit_prune.errors import InputError

TEST_IMAGES = 360  # a fifth; scikit-learn ships no split
GREY_LEVELS = 16  # pixels are counts 0..16 of 4x4 bitmap blocks


class GreyDigits(ImageData):
    """Digits as square grey images.

    Args:
        resolution: Height and width after bilinear resizing; null keeps the size of the data set.
        channels: 1 for grey, 3 for three equal channels.
        flip: Whether half of the training images are mirrored; off, since a mirrored digit is another sign.
        **options: Those of every data set.
    """

    CLASSES = 10
    SIDE: ClassVar[int]
    GREY: ClassVar[tuple[float, float]]
    """Mean and standard deviation of the training images' pixels, on the scale 0..1."""

    def __init__(
        self, resolution: int | None = 32, channels: Literal[1, 3] = 1, flip: bool = False, **options: Any
    ) -> None:
        self.MEAN, self.STD = (self.GREY[0],) * channels, (self.GREY[1],) * channels
        super().__init__(flip=flip, **options)
        self.resolution = self.SIDE if resolution is None else resolution
        self.image_shape = (channels, self.resolution, self.resolution)

    def _resized(self, pixels: Tensor, labels: Tensor) -> MemoryImages:
        """Images in memory, from uint8 [N, 1, SIDE, SIDE] and int64 [N]."""
        self.classes = tuple(str(digit) for digit in range(self.CLASSES))
        pixels = resize_pixels(pixels, self.resolution)  # uint8 [N, 1, S, S]
        return MemoryImages(pixels.expand(-1, self.image_shape[0], -1, -1).contiguous(), labels)


class DigitsData(GreyDigits):
    """Handwritten digits (Alpaydin, Kaynak 1998, as in scikit-learn): 1,437 training and 360 test images of 8x8 pixels.

    The split is class-balanced and always the same, whatever `seed`; `root` and `download` are not used.

    The arguments are those of `GreyDigits`.
    """

    SIDE = 8
    GREY = (0.3047, 0.3235)  # at 32x32

    def load_split(self, split: str) -> MemoryImages:
        """Images of the split in memory, resized."""
        grey, labels = load_digits(return_X_y=True)  # [1797, 64], 0..16
        pixels = torch.from_numpy(grey).view(-1, 1, 8, 8).mul(255 / GREY_LEVELS).round().to(torch.uint8)
        targets = torch.from_numpy(labels).long()
        order = stratified_order(targets, seeded_generator(0, "digits"))
        chosen = (order[TEST_IMAGES:] if split == "train" else order[:TEST_IMAGES]).sort().values
        return self._resized(pixels[chosen], targets[chosen])


class MNISTData(GreyDigits):
    """MNIST (LeCun, Cortes): 60,000 training and 10,000 test images of handwritten digits, 28x28 pixels, grey.

    Expects `root/MNIST/raw/` with the four idx files; `download` fetches them.

    The arguments are those of `GreyDigits`.
    """

    SIDE = 28
    GREY = (0.1307, 0.3081)

    def prepare_data(self) -> None:
        """Downloads the four files where asked for and missing. InputError: The download failed."""
        if not self.download:
            return
        try:
            with no_empty_folder(Path(self.root) / "MNIST" / "raw"):
                torchvision.datasets.MNIST(self.root, download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"download of MNIST failed ({' '.join(str(error).split())}); check the connection or put the files by"
                f" hand into {self.root}/MNIST/raw"
            ) from error

    def load_split(self, split: str) -> MemoryImages:
        """Images of the split in memory, resized."""
        try:
            dataset = torchvision.datasets.MNIST(self.root, train=split == "train")
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"root={self.root} has no MNIST/raw/ with the four files *-ubyte; set download to true or root to the"
                " folder that holds MNIST/"
            ) from error
        return self._resized(dataset.data[:, None], dataset.targets.long())
