"""The networks and batches of `tasks.py`: what people bring, small and with random weights."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.segmentation import FCN, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from lit_prune.models import build_backbone
from lit_prune.task import Custom, Segmentation, Task

REAL = Path(__file__).resolve().parents[2] / "shared" / "tools" / "real_networks.py"


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        build: makes the network, a seed is set before.
        batch: makes a batch of so many samples.
        task: as a user gives it; None where it is recognised.
        samples: in a batch.
        keep: share of the multiply-adds that a plan keeps.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    task: Task | str | None = None
    samples: int = 12
    keep: float = 0.6


def images(count: int, side: int = 32, channels: int = 3) -> Tensor:
    """Random images that are not alike at their positions."""
    return F.avg_pool2d(torch.randn(count, channels, side + 2, side + 2), 3, 1) * 3


def conv(i: int, o: int, stride: int = 1) -> nn.Sequential:
    """Convolution, norm, ReLU."""
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class UNet(nn.Module):
    """Two levels, transposed convolutions, skips joined by concatenation."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.down1, self.down2, self.deep = conv(3, 12), conv(12, 20, 2), conv(20, 32, 2)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 20, 2, 2), nn.ConvTranspose2d(20, 12, 2, 2)
        self.mix2, self.mix1, self.head = conv(40, 20), conv(24, 12), nn.Conv2d(12, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The answer."""
        one = self.down1(x)
        two = self.down2(one)
        y = self.mix2(torch.cat([self.up2(self.deep(two)), two], 1))
        return self.head(self.mix1(torch.cat([self.up1(y), one], 1)))


class Trunk(nn.Module):
    """A small trunk with heads behind it, answered in any form."""

    def __init__(self, answer: Callable[..., Any], *widths: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv(3, 16), conv(16, 24, 2), conv(24, 32, 2))
        self.heads = nn.ModuleList(nn.Linear(32, width) for width in widths)
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        """The answer."""
        pooled = self.trunk(x).mean((2, 3))
        return self.answer(*(head(pooled) for head in self.heads))


class TwoInputs(nn.Module):
    """An image and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector = nn.Sequential(conv(3, 16), conv(16, 24, 2)), nn.Linear(5, 24)
        self.mix, self.head = nn.Linear(48, 20), nn.Linear(20, 4)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        """The answer."""
        both = torch.cat([self.image(image).mean((2, 3)), F.relu(self.vector(vector))], 1)
        return self.head(F.relu(self.mix(both)))


class Siamese(nn.Module):
    """One trunk, run on both images; the answer is how far apart they are."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv(3, 16), conv(16, 24, 2))
        self.head = nn.Linear(24, 8)

    def embed(self, x: Tensor) -> Tensor:
        """Eight numbers for an image."""
        return self.head(self.trunk(x).mean((2, 3)))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """The answer."""
        return (self.embed(one) - self.embed(other)).square().sum(1)


class Heatmaps(nn.Module):
    """Key points as maps at half the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(conv(3, 16), conv(16, 24, 2), conv(24, 24)), nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The answer."""
        return self.head(self.body(x))


def autoencoder() -> nn.Module:
    """Convolutions down, transposed convolutions up."""
    up = [nn.ConvTranspose2d(24, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1)]
    return nn.Sequential(conv(3, 16, 2), conv(16, 24, 2), *up)


def super_resolution() -> nn.Module:
    """Twice the resolution by PixelShuffle."""
    return nn.Sequential(conv(3, 16), conv(16, 16), nn.Conv2d(16, 12, 3, 1, 1), nn.PixelShuffle(2))


def generator() -> nn.Module:
    """Noise [B, 16, 1, 1] to images, by transposed convolutions."""
    up = [nn.ConvTranspose2d(16, 24, 4), nn.BatchNorm2d(24), nn.ReLU()]
    up += [nn.ConvTranspose2d(24, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*up, nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh())


class Signal(nn.Module):
    """One or three dimensions."""

    def __init__(self, kind: type[nn.Module], norm: type[nn.Module], channels: int) -> None:
        super().__init__()
        self.one, self.two, self.norm = kind(channels, 16, 3, 1, 1), kind(16, 20, 3, 2, 1), norm(16)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        """The answer."""
        y = F.relu(self.two(F.relu(self.norm(self.one(x)))))
        return self.head(y.flatten(2).mean(2))


def real_networks() -> ModuleType:
    """The trained networks of other people, `real_networks.py`."""
    spec = importlib.util.spec_from_file_location("real_networks", REAL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def espnet() -> nn.Module:
    """The trained network of `real_networks.py`."""
    return real_networks().espnet_camvid()


def hugging_face(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """An image classifier of transformers from a small configuration."""

    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(num_labels=4, **settings)
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return build


def named(count: int) -> dict[str, Tensor]:
    """A batch as the Hugging Face's loaders make them."""
    return {"pixel_values": images(count), "labels": torch.arange(count) % 4}


def labelled(count: int) -> tuple[Tensor, Tensor]:
    """Images and classes."""
    return images(count), torch.arange(count) % 4


def mapped(side: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Images and label maps."""
    return lambda count: (images(count, side), torch.randint(4, (count, side, side)))


def boxes(side: int) -> Callable[[int], tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Images with a box each."""

    def batch(count: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        target = {"boxes": torch.tensor([[4.0, 4.0, 0.7 * side, 0.6 * side]]), "labels": torch.tensor([1])}
        return list(torch.rand(count, 3, side, side)), [dict(target) for _ in range(count)]

    return batch


def trunk() -> nn.Module:
    """A ResNet-18 that answers with its last maps."""
    return IntermediateLayerGetter(torchvision.models.resnet18(), {"layer4": "out"})


def lraspp() -> nn.Module:
    """Torchvision's LR-ASPP on MobileNetV3."""
    return torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)


def retinanet(side: int) -> nn.Module:
    """Torchvision's RetinaNet on the pyramid of a ResNet-18."""
    pyramid = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return RetinaNet(pyramid, num_classes=3, min_size=side, max_size=side)


def detector(name: str, side: int) -> Callable[[], nn.Module]:
    """A detector of torchvision for small images."""

    def build() -> nn.Module:
        model = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, num_classes=3)
        model.transform.min_size, model.transform.max_size = (side,), side
        if model.transform.fixed_size is not None:
            model.transform.fixed_size = (side, side)
        return model

    return build


def both_losses(output: tuple[Tensor, Tensor], batch: Any) -> Tensor:
    """Classes and a number."""
    return F.cross_entropy(output[0], batch[1], reduction="none") + (output[1][:, 0] - batch[2]).square()


def named_losses(output: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Classes and a number, by name."""
    number = (output["number"][:, 0] - batch["number"]).square()
    return F.cross_entropy(output["kind"], batch["kind"], reduction="none") + number


def pairs(count: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Two images and whether they belong together."""
    return (images(count), images(count)), (torch.arange(count) % 2).float()


VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

CASES: dict[str, Case] = {
    "own classifier": Case(lambda: build_backbone("cifar_resnet20", num_classes=4), labelled),
    "U-Net": Case(UNet, mapped(32)),
    "ESPNet": Case(espnet, lambda n: (images(n, 64) / 5, torch.randint(12, (n, 64, 64))), Segmentation(void=11), 6),
    "lraspp": Case(lraspp, mapped(64), samples=6),
    "fcn": Case(lambda: FCN(trunk(), FCNHead(512, 4)), mapped(64)),
    "deeplabv3": Case(lambda: DeepLabV3(trunk(), DeepLabHead(512, 4)), mapped(64)),
    "ssdlite": Case(detector("ssdlite320_mobilenet_v3_large", 128), boxes(128), samples=4),
    "retinanet": Case(lambda: retinanet(64), boxes(64)),
    "fasterrcnn": Case(detector("fasterrcnn_mobilenet_v3_large_320_fpn", 64), boxes(64)),
    "HF ViT": Case(
        hugging_face("ViT", image_size=32, patch_size=8, **VIT),
        named,
    ),
    "HF ResNet": Case(
        hugging_face("ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"), named
    ),
    "HF ConvNeXt": Case(hugging_face("ConvNext", hidden_sizes=[16, 32], depths=[1, 1], num_stages=2), named),
    "HF Swin": Case(
        hugging_face("Swin", image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4),
        named,
    ),
    "regression": Case(lambda: Trunk(lambda y: y, 3), lambda n: (images(n), torch.randn(n, 3))),
    "heat maps": Case(Heatmaps, lambda n: (images(n), torch.rand(n, 5, 16, 16))),
    "multi-label": Case(lambda: Trunk(lambda y: y, 4), lambda n: (images(n), (torch.randn(n, 4) > 0.3).float())),
    "soft labels": Case(lambda: Trunk(lambda y: y, 4), lambda n: (images(n), torch.randn(n, 4).softmax(1))),
    "embeddings": Case(lambda: Trunk(lambda y: F.normalize(y, dim=1), 8), images),
    "two heads, tuple": Case(
        lambda: Trunk(lambda y, z: (y, z), 4, 1), lambda n: (*labelled(n), torch.randn(n)), Custom(loss=both_losses)
    ),
    "two heads, dict": Case(
        lambda: Trunk(lambda y, z: {"kind": y, "number": z}, 4, 1),
        lambda n: {"image": images(n), "kind": torch.arange(n) % 4, "number": torch.randn(n)},
        Custom(loss=named_losses),
    ),
    "two inputs": Case(TwoInputs, lambda n: ((images(n), torch.randn(n, 5)), torch.arange(n) % 4)),
    "siamese": Case(Siamese, pairs),
    "autoencoder": Case(autoencoder, lambda n: (x := images(n), x)),
    "super-resolution": Case(super_resolution, lambda n: (images(n, 16), images(n, 32))),
    "1-D": Case(lambda: Signal(nn.Conv1d, nn.BatchNorm1d, 6), lambda n: (torch.randn(n, 6, 40), torch.arange(n) % 4)),
    "3-D": Case(
        lambda: Signal(nn.Conv3d, nn.BatchNorm3d, 2), lambda n: (torch.randn(n, 2, 6, 8, 8), torch.arange(n) % 4)
    ),
    "GAN generator": Case(generator, lambda n: torch.randn(n, 16, 1, 1)),
}
