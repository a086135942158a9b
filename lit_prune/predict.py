"""Image files through a compact network: prepared as its folder says, classes by name."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.image_files import read_image
from lit_prune.preparation import Preparation
from lit_prune.structure import load_compact, read_preparation
from lit_prune.task.outputs import answer

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@dataclass(frozen=True)
class Guess:
    """A class that the network gives an image: its name (its number where it has none) and probability."""

    label: str
    probability: float


def read_prepared(file: str | Path, preparation: Preparation) -> Tensor:
    """Input of the network for one image file, float32 [C, H, W].

    The short side is resized, the centre cut out (a smaller side is padded with zeros), pixels are scaled and
    normalised: as torchvision's Resize, CenterCrop, ToTensor and Normalize on Pillow images.

    Raises:
        InputError: the file is no readable image.
    """
    image = _resized(read_image(file), preparation)
    height, width = preparation.size
    left, top = (round((have - want) / 2) for have, want in zip(image.size, (width, height), strict=True))
    cut = image.crop((left, top, left + width, top + height))
    if preparation.channels == "grey":
        cut = cut.convert("L")
    pixels = torch.from_numpy(np.array(cut, dtype=np.float32) / 255)
    pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.expand(len(preparation.mean), -1, -1)
    return preparation.normalise(pixels[None])[0]


def _resized(image: Image.Image, preparation: Preparation) -> Image.Image:
    short, size = preparation.resize, image.size
    if min(size) == short:
        return image
    width, height = (short if side == min(size) else int(short * side / min(size)) for side in size)
    return image.resize((width, height), FILTERS[preparation.interpolation])


def predict_compact(
    folder: str | Path, images: Sequence[str | Path], top: int = 5, trust: Sequence[str] = ()
) -> dict[str, list[Guess]]:
    """The likeliest classes of image files, the likeliest first.

    Args:
        folder: compact folder that says how images are prepared.
        images: files.
        top: classes an image.
        trust: import paths that the folder may name, see `load_compact`.

    Raises:
        InputError: no compact folder, one that does not say how images are prepared, an unreadable image, or a network
            that does not classify.
    """
    if top < 1 or not images:
        raise InputError(f"predict: top={top} and {len(images)} images; give at least one of each")
    preparation, network = read_preparation(folder), load_compact(folder, trust=trust)
    if preparation is None:
        raise InputError(f"{folder} does not say how images are prepared; save it with save_compact(preparation=...)")
    found = {}
    for file in images:
        with torch.inference_mode():
            output = answer(network(read_prepared(file, preparation)[None]))
        if output.ndim != 2:
            raise InputError(f"{folder}: the network gives no logits [1, classes], so that there are none to name")
        found[str(file)] = _likeliest(output[0], preparation.classes, top)
    return found


def _likeliest(logits: Tensor, names: Sequence[str], top: int) -> list[Guess]:
    probabilities, places = logits.softmax(0).topk(min(top, len(logits)))
    labels = [names[place] if place < len(names) else str(place) for place in places.tolist()]
    return [Guess(label, p) for label, p in zip(labels, probabilities.tolist(), strict=True) if math.isfinite(p)]
