"""Image files read as RGB of 8 bits; needs Pillow alone, so that a compact network runs without what trains it."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from lit_prune.errors import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError)
"""What Pillow raises for files that are no whole images, SyntaxError for a broken PNG."""


def list_images(folder: str | Path) -> list[str]:
    """Paths of the images in `folder` and below it, sorted."""
    found = (os.path.join(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(file for file in found if file.lower().endswith(IMAGE_SUFFIXES))


def read_image(file: str | Path) -> Image.Image:
    """The image in `file` as RGB, 8 bits a channel.

    Grey is repeated, an alpha channel dropped, a palette looked up; 16 bits become 8 by rounding value / 257.

    Raises:
        InputError: The file is missing, truncated, no image, or one of more pixels than Pillow decodes without being
            told to.
    """
    try:
        with Image.open(file) as image:
            return _eight_bits(image).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"image {file}: no such file") from None
    except BROKEN_IMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot decode the image {file} ({reason}); replace or delete the file") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey images of 16 bits as 8 bits; Pillow's own conversion would clip them to white."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ValueError(
            f"its pixels are of the kind {image.mode}, whose range is not known; save it with 8 or 16 bits"
        )
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
