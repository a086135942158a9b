"""How images become what a network reads, and what its outputs are called: plain values that travel with it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@checked
@dataclass(frozen=True)
class Preparation:
    """From an image file to a network's input: resize the short side, cut the centre out, scale to 0..1, normalise.

    Attributes:
        mean: of each channel on the scale 0..1.
        std: likewise.
        size: height and width of the input.
        resize: length to which the short side is resized before the centre is cut out.
        channels: their order, "RGB", or "grey" (repeated where `mean` has several values).
        interpolation: of the resize, antialiased.
        classes: names of the outputs; empty where they have none.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    resize: int
    channels: str = "RGB"
    interpolation: str = "bilinear"
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Turns lists into tuples and checks the values. InputError: a value is of the wrong kind, or out of range."""
        for name in ("mean", "std", "size", "classes"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise InputError(f"preparation: {name} is a {type(value).__name__}; give a list")
            object.__setattr__(self, name, tuple(value))
        numbers = (*self.mean, *self.std)
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise InputError("preparation: mean and std must be finite numbers")
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise InputError("preparation: mean and std need one value a channel each, std above 0")
        sizes = (*self.size, self.resize)
        if len(sizes) != 3 or not all(type(size) is int and 0 < size <= 2**16 for size in sizes):
            raise InputError("preparation: size is height and width, resize a length, in pixels")
        if self.interpolation not in INTERPOLATIONS or self.channels not in ("RGB", "grey"):
            raise InputError(f"preparation: interpolation is one of {', '.join(INTERPOLATIONS)}, channels RGB or grey")
        if not all(isinstance(name, str) for name in self.classes):
            raise InputError("preparation: classes are names")

    def normalise(self, images: Tensor) -> Tensor:
        """`(images - mean) / std` channel by channel; images [B, C, H, W] on the scale 0..1."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Any, source: str = "preparation") -> "Preparation":
        """What `to_dict` wrote. InputError: a value is missing, unknown or wrong; `source` is named."""
        try:
            return cls(**values)
        except (TypeError, InputError) as error:
            raise InputError(f"{source}: {error}; save it again") from error

    @classmethod
    def of_timm(cls, model: nn.Module, classes: Sequence[str] = ()) -> "Preparation":
        """What timm says of a network with its published weights (`pretrained_cfg`). InputError: it says nothing."""
        said = getattr(model, "pretrained_cfg", None)
        if not isinstance(said, Mapping) or not said.get("mean"):
            raise InputError(f"preparation: {type(model).__name__} has no pretrained_cfg of timm; give the values")
        _, height, width = said["input_size"]
        resize = math.floor(min(height, width) / (said.get("crop_pct") or 1.0))
        wanted = str(said.get("interpolation"))
        kind = wanted if wanted in INTERPOLATIONS else "bilinear"
        return cls(said["mean"], said["std"], (height, width), resize, interpolation=kind, classes=tuple(classes))


class Normalised(nn.Module):
    """A network that normalises its images itself: it takes them on the scale 0..1."""

    def __init__(self, network: nn.Module, preparation: Preparation) -> None:
        super().__init__()
        self.network = network
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preparation, name), dtype=torch.float32)
            self.register_buffer(name, values[:, None, None])

    def forward(self, images: Tensor) -> Any:
        """Output of the network for images [B, C, H, W] on the scale 0..1."""
        return self.network((images - self.mean) / self.std)
