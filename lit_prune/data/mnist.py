"""MNIST, read by torchvision and scaled up to the size that image networks expect."""

from pathlib import Path
from typing import Any, Literal

import torchvision

from lit_prune.data.download import no_empty_folder
from lit_prune.data.images import ImageData
from lit_prune.data.sources import MemoryImages, resize_pixels
from lit_prune.errors import InputError


class MNISTData(ImageData):
    """MNIST (LeCun, Cortes): 60,000 training and 10,000 test images of handwritten digits, 28x28 pixels, grey.

    Expects `root/MNIST/raw/` with the four idx files; `download` fetches them.

    Args:
        resolution: Height and width after bilinear resizing; null keeps 28.
        channels: 1 for grey, 3 for three equal channels.
        flip: Whether half of the training images are mirrored; off, since a mirrored digit is another sign.
        **options: Those of every data set.
    """

    CLASSES = 10

    def __init__(
        self, resolution: int | None = 32, channels: Literal[1, 3] = 1, flip: bool = False, **options: Any
    ) -> None:
        self.MEAN, self.STD = (0.1307,) * channels, (0.3081,) * channels
        super().__init__(flip=flip, **options)
        self.resolution = 28 if resolution is None else resolution
        self.image_shape = (channels, self.resolution, self.resolution)

    def prepare_data(self) -> None:
        """Downloads the four files where asked for and missing.

        Raises:
            InputError: The download failed.
        """
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
        self.classes = tuple(str(digit) for digit in range(10))
        pixels = resize_pixels(dataset.data[:, None], self.resolution)  # uint8 [N, 1, S, S]
        return MemoryImages(pixels.expand(-1, self.image_shape[0], -1, -1).contiguous(), dataset.targets.long())
