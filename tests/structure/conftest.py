"""Small networks, one for each kind of coupling, with norm statistics that are not trivial."""

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig

from lit_prune.models import build_backbone


class MixedNet(nn.Module):
    """A concatenation added to a wide layer, PReLU, InstanceNorm, a scale, a transposed and a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 9, 1)
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 5, 3, padding=1)
        self.prelu = nn.PReLU(9)
        self.scale = nn.Parameter(torch.rand(9, 1, 1) + 0.5)
        self.up = nn.ConvTranspose2d(9, 7, 2, stride=2)
        self.norm = nn.InstanceNorm2d(7, affine=True)
        self.depthwise = nn.Conv2d(7, 7, 3, padding=1, groups=7)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.hidden = nn.Linear(28, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        both = torch.cat([self.left(images), self.right(images)], 1)
        features = self.up(self.prelu((both + self.wide(images)) * self.scale))
        features = self.pool(F.relu(self.depthwise(F.relu(self.norm(features)))))
        return self.head(F.gelu(self.hidden(features.flatten(1))))


def _with_classifier(model: nn.Module, features: nn.Module, width: int) -> nn.Module:
    """`model`, made without memory, with small `features` of `width` values and a small classifier."""
    model.features = features
    model.classifier = nn.Sequential(nn.Linear(width, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 10))
    return model


def _small_vgg() -> nn.Module:
    with torch.device("meta"):
        model = models.vgg11_bn()
    return _with_classifier(model, models.vgg.make_layers([8, "M", 12, "M", 16], True), 16 * 49)


def _initialise(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def _small_alexnet() -> nn.Module:
    with torch.device("meta"):
        model = models.alexnet()
    model.features.to_empty(device=torch.empty(()).device).apply(_initialise)
    return _with_classifier(model, model.features, 256 * 36)


def _small_convnext() -> nn.Module:
    return models.ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=5)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "resnet18": (lambda: models.resnet18(num_classes=10, width_per_group=64), (3, 32, 32)),
    "cifar_resnet20": (lambda: build_backbone("cifar_resnet20", num_classes=10), (3, 16, 16)),
    "wide_stem": (lambda: build_backbone("cifar_resnet8_wide_stem", num_classes=10), (3, 32, 32)),
    "convnet": (lambda: build_backbone("cifar_convnet", num_classes=10, widths=(8, 12, 16), hidden=20), (3, 16, 16)),
    "vgg11_bn": (_small_vgg, (3, 16, 16)),
    "alexnet": (_small_alexnet, (3, 64, 64)),
    "mobilenet_v2": (lambda: models.mobilenet_v2(num_classes=10, width_mult=0.5), (3, 32, 32)),
    "efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=10), (3, 32, 32)),
    "densenet": (lambda: models.DenseNet(6, (2, 2), 12, num_classes=10), (3, 32, 32)),
    "squeezenet": (lambda: models.squeezenet1_1(num_classes=10), (3, 48, 48)),
    "mixed": (MixedNet, (3, 8, 8)),
    "vit": (lambda: models.VisionTransformer(32, 8, 2, 4, 64, 96, num_classes=10), (3, 32, 32)),
    "deit": (
        lambda: timm.create_model("deit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10),
        (3, 32, 32),
    ),
    "swin": (lambda: models.SwinTransformer([4, 4], 12, [2], [2], [4, 4], num_classes=5), (3, 32, 32)),
    "convnext": (_small_convnext, (3, 32, 32)),
}


def _build(name: str) -> tuple[nn.Module, Tensor]:
    """A seeded network in evaluation mode with random norm statistics, and two images for it."""
    torch.manual_seed(0)
    builder, shape = NETWORKS[name]
    model = builder()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.uniform_(-0.3, 0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval(), torch.randn(2, *shape)


def _random_ranks(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Seeded scores for every convolution and linear layer."""
    generator = torch.Generator().manual_seed(seed)
    layers = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    weighted = {name: module for name, module in model.named_modules() if isinstance(module, layers)}
    widths = {n: m.out_features if isinstance(m, nn.Linear) else m.out_channels for n, m in weighted.items()}
    return {name: torch.rand(width, generator=generator) for name, width in widths.items()}


@pytest.fixture(scope="session")
def build() -> Callable[[str], tuple[nn.Module, Tensor]]:
    """`build(name)`: a network of `NETWORKS` and two images for it."""
    return _build


@pytest.fixture(scope="session")
def random_ranks() -> Callable[..., dict[str, Tensor]]:
    """`random_ranks(model, seed=0)`: scores for every convolution and linear layer."""
    return _random_ranks
