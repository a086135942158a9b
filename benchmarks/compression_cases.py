"""The trained networks of `compression.py` and their images, as they lie in a folder of samples.

A folder of samples has `data/` (CIFAR strips as lossless WebP of 500 images each, image folders, label maps),
`data/weights/` and `tools/real_networks.py` (networks of other people as plain modules).
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lit_prune.models import build_backbone, load_weights
from lit_prune.task import Segmentation, Task

A = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
B = ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Bench:
    """A network and its images, normalised.

    Attributes:
        model: in evaluation mode.
        train: images and targets that calibration and repair may read.
        test: the others.
        batch: samples at once.
        task: as a user gives it.
        moves: whether training images are shifted and mirrored.
    """

    model: nn.Module
    train: Part
    test: Part
    batch: int = 125
    task: Task | str | None = None
    moves: bool = True

    def to(self, device: str) -> "Bench":
        """The same, network and images on a device."""
        train, test = (tuple(values.to(device) for values in part) for part in (self.train, self.test))
        return replace(self, model=self.model.to(device), train=train, test=test)


def split(part: Part, size: int, order: Tensor | None = None) -> list[Part]:
    """Batches of a part."""
    order = torch.arange(len(part[1])) if order is None else order
    return [tuple(values[chosen] for values in part) for chosen in order.split(size)]


def normalised(pixels: np.ndarray, constants: Sequence[Sequence[float]]) -> Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in constants)
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std


def strips(folder: Path, name: str) -> np.ndarray:
    """All images of a split, uint8 [N, 32, 32, 3]."""
    found = sorted(folder.glob(f"{name}-*.webp"))
    return np.concatenate([np.asarray(Image.open(file)).reshape(-1, 32, 32, 3) for file in found])


def cifar(samples: Path, name: str, constants: Sequence[Sequence[float]]) -> list[Part]:
    """Training and test part."""
    folder = samples / "data" / name
    labels = np.load(folder / "labels.npz")
    return [
        (normalised(strips(folder, part), constants), torch.from_numpy(labels[part].astype("int64")))
        for part in ("train", "test")
    ]


def published(samples: Path, depth: int, digest: str) -> Bench:
    """A CIFAR-10 ResNet with its published weights."""
    model = build_backbone(f"cifar_resnet{depth}", 10)
    load_weights(model, samples / f"data/weights/cifar10_resnet{depth}-{digest}.th")
    return Bench(model.eval(), *cifar(samples, "cifar10", A))


def resnet20_wide_stem(samples: Path) -> Bench:
    """CIFAR-100."""
    model = build_backbone("cifar_resnet20_wide_stem", 100)
    load_weights(model, samples / "data/weights/cifar100_resnet20_wide_stem.safetensors")
    return Bench(model.eval(), *cifar(samples, "cifar100", B))


def photographs(files: Sequence[Path], side: int, crop: int) -> np.ndarray:
    """Images with a short side of `side`, their central square of `crop`, uint8."""
    found = []
    for file in files:
        image = Image.open(file).convert("RGB")
        scale = side / min(image.size)
        size = tuple(round(length * scale) for length in image.size)
        image = image.resize(size, Image.BICUBIC if side > 64 else Image.BILINEAR)
        left, top = ((length - crop) // 2 for length in image.size)
        found.append(np.asarray(image.crop((left, top, left + crop, top + crop))))
    return np.stack(found)


def tiny_resnet32(samples: Path) -> Bench:
    """Tiny-ImageNet at 32 pixels."""
    model = build_backbone("cifar_resnet32_projection", 200)
    load_weights(model, samples / "data/weights/tinyimagenet32_resnet32.safetensors")
    folder = samples / "data/tiny-imagenet-200"
    classes = sorted((folder / "wnids.txt").read_text().split())
    parts = []
    for name in ("train", "val"):
        files = [
            (file, label) for label, wnid in enumerate(classes) for file in sorted((folder / name / wnid).iterdir())
        ]
        pixels = photographs([file for file, _ in files], 32, 32)
        parts.append((normalised(pixels, A), torch.tensor([label for _, label in files])))
    return Bench(model.eval(), *parts)


def real_networks(samples: Path):
    """The module of other people's networks."""
    spec = importlib.util.spec_from_file_location("real_networks", samples / "tools" / "real_networks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def efficientnet_lite0(samples: Path) -> Bench:
    """ImageNet photographs, every second for calibration; the targets are the dense network's own answers."""
    files = sorted((samples / "data/imagenet-1k-photos").glob("*/*.jpg"), key=lambda file: int(file.stem))
    images = normalised(photographs(files, 256, 224), HALF)
    labels = torch.tensor([int(file.stem) for file in files])
    model = real_networks(samples).efficientnet_lite0()
    return Bench(model, (images[::2], labels[::2]), (images[1::2], labels[1::2]), 25, moves=False)


def espnet(samples: Path) -> Bench:
    """CamVid street scenes."""
    networks, parts = real_networks(samples), []
    for name in ("train", "test"):
        folder = samples / "data/camvid" / name
        images = [networks.camvid_input(np.asarray(Image.open(f))) for f in sorted((folder / "images").iterdir())]
        labels = [np.asarray(Image.open(f)).astype("int64") for f in sorted((folder / "labels").iterdir())]
        parts.append((torch.stack(images), torch.from_numpy(np.stack(labels))))
    return Bench(networks.espnet_camvid(), *parts, batch=6, task=Segmentation(void=11), moves=False)


CASES: dict[str, Callable[[Path], Bench]] = {
    "resnet56": lambda samples: published(samples, 56, "4bfd9763"),
    "resnet20-wide-stem": resnet20_wide_stem,
    "tiny-resnet32": tiny_resnet32,
    "efficientnet-lite0": efficientnet_lite0,
    "espnet": espnet,
    "resnet20": lambda samples: published(samples, 20, "12fca82f"),
    "resnet32": lambda samples: published(samples, 32, "d509ac18"),
}


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images mirrored at random and shifted by up to four pixels, as in training."""
    down, right, mirror = (torch.randint(0, high, (len(images),), generator=generator) for high in (9, 9, 2))
    padded, (height, width) = F.pad(images, (4, 4, 4, 4)), images.shape[2:]
    return torch.stack(
        [
            (image.flip(2) if m else image)[:, d : d + height, r : r + width]
            for image, d, r, m in zip(padded, down, right, mirror, strict=True)
        ]
    )
