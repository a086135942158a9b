"""Grey images of digits, and those that come with scikit-learn: the data set that needs no file and no network."""

from typing import Any, ClassVar, Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from lit_prune.data.images import ImageData
from lit_prune.data.sampling import seeded_generator, stratified_order
from lit_prune.data.sources import MemoryImages, resize_pixels


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


TEST_IMAGES = 360  # a fifth; scikit-learn ships no split
GREY_LEVELS = 16  # pixels are counts 0..16 of 4x4 bitmap blocks


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
