"""Normalisation and the random views of training images; uint8 in, uint8 out until normalised."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from lit_prune.data.sampling import seeded_generator
from lit_prune.data.sources import FileImages, ImageSource


@dataclass(frozen=True)
class Normalisation:
    """Maps pixels 0..255 to `(pixel / 255 - mean) / std`, channel by channel.

    Attributes:
        mean: Mean of each channel on the scale 0..1.
        std: Standard deviation of each channel on the same scale, > 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalised images, float32 [B, C, H, W], of uint8 pixels of the same shape, on their device."""
        scale, shift = _scale_and_shift(self.mean, self.std, pixels.device)
        return pixels.float().mul_(scale).sub_(shift)


@lru_cache(maxsize=8)  # a copy to the device for every batch would make it wait
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """`1 / (255 std)` and `mean / std`, each [C, 1, 1]."""
    means, stds = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    return (1 / (255 * stds)).to(device), (means / stds).to(device)


@dataclass(frozen=True)
class Draws:
    """Where each image is cut out and whether it is mirrored; all three int64 or bool [N].

    Attributes:
        top: First row of the crop in the padded image, 0..2·pad.
        left: First column of the crop in the padded image, 0..2·pad.
        flip: Whether the crop is mirrored.
    """

    top: Tensor
    left: Tensor
    flip: Tensor

    def __getitem__(self, indices: Tensor) -> "Draws":
        return Draws(self.top[indices], self.left[indices], self.flip[indices])

    def to(self, device: torch.device) -> "Draws":
        """The same draws on `device`."""
        return Draws(self.top.to(device), self.left.to(device), self.flip.to(device))


@lru_cache(maxsize=4)
def draw_crops(count: int, pad: int, flip: bool, seed: int, stream: tuple[int | str, ...]) -> Draws:
    """Crop offsets (uniform on 0..2·pad) and mirrorings (probability 1/2 where `flip`) of all `count` images.

    All images are drawn at once and then indexed, so the draws of an image depend on `seed`, on `stream`,
    which is (purpose, epoch), and on its index, never on batch size, rank or worker.
    """
    generator = seeded_generator(seed, *stream)
    top, left = torch.randint(0, 2 * pad + 1, (2, count), generator=generator)
    return Draws(top, left, torch.rand(count, generator=generator) < (0.5 if flip else 0.0))


def pad_images(pixels: Tensor, pad: int, padding: str) -> Tensor:
    """Images with `pad` more pixels on every side: zeros, or mirrored at the border without repeating it."""
    if padding == "zero":
        return F.pad(pixels, (pad,) * 4)
    height, width = pixels.shape[-2:]
    far = [(torch.arange(-pad, size + pad, device=pixels.device).abs(), size) for size in (height, width)]
    rows, columns = (torch.where(index < size, index, 2 * (size - 1) - index) for index, size in far)
    return pixels.index_select(-2, rows).index_select(-1, columns)


def crop_and_flip(padded: Tensor, height: int, width: int, draws: Draws) -> Tensor:
    """One window [B, C, height, width] of every padded image, mirrored where drawn."""
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: [B, C, tops, lefts, height, width]
    crops = windows[torch.arange(len(padded), device=padded.device), :, draws.top, draws.left]
    return torch.where(draws.flip[:, None, None, None], crops.flip(-1), crops)


class Augmentation(Protocol):
    """A random view of one training image, a pure function of (seed, purpose, epoch, index)."""

    def view(self, source: Any, epoch: int, index: int) -> Tensor:
        """The view of image `index` of an `ImageSource` of the kind that it is for, in `epoch`, uint8 [C, H, W]."""


@dataclass(frozen=True)
class PadCropFlip:
    """Pad, cut out a window of the original size, mirror: the usual augmentation of small images."""

    count: int
    seed: int
    stream: str = "train"
    pad: int = 4
    padding: Literal["zero", "reflect"] = "zero"
    flip: bool = True

    def draws(self, epoch: int) -> Draws:
        """Draws of all images in `epoch`."""
        return draw_crops(self.count, self.pad, self.flip, self.seed, (self.stream, "crops", epoch))

    def apply(self, pixels: Tensor, draws: Draws) -> Tensor:
        """Views of the images, uint8 [B, C, H, W] as given, for the draws of these B images."""
        height, width = pixels.shape[-2:]
        return crop_and_flip(pad_images(pixels, self.pad, self.padding), height, width, draws)

    def view(self, source: ImageSource, epoch: int, index: int) -> Tensor:
        """The view of image `index` in `epoch`, uint8 [C, H, W]."""
        chosen = torch.tensor([index])
        return self.apply(source.image(index)[None], self.draws(epoch)[chosen])[0]


@dataclass(frozen=True)
class ResizedCropFlip:
    """Random area (8 to 100 %) and aspect (3/4 to 4/3), resized, mirrored: the usual augmentation of photographs.

    torchvision.transforms.v2 on tensors of one image each: 1.37 ms an image of 400x200 pixels on one core, decoding
    (0.71) included; on Pillow images 1.66, with whole batches mirrored instead 1.54. Crops have sizes of their own, so
    nothing else can be done on batches but to normalise, which is.
    """

    size: int
    seed: int
    stream: str = "train"
    flip: bool = True

    def view(self, source: FileImages, epoch: int, index: int) -> Tensor:
        """The view of image `index` in `epoch`, uint8 [C, size, size]."""
        transform = v2.Compose([v2.RandomResizedCrop(self.size), v2.RandomHorizontalFlip(0.5 if self.flip else 0.0)])
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.set_rng_state(seeded_generator(self.seed, self.stream, "view", epoch, index).get_state())
            return transform(v2.functional.pil_to_tensor(source.open(index)))
