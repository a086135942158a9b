"""Grey images of digits, scaled up to the size that image networks expect."""

from typing import Any, ClassVar, Literal

from torch import Tensor

from lit_prune.data.images import ImageData
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
