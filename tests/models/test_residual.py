"""Residual blocks are found by what they compute: leaving one out leaves what its branch was added to."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models

from lit_prune.models import drop_blocks, find_blocks
from lit_prune.models.residual import residual_blocks


class Branch(nn.Module):
    """`x + f(x)`, or without the sum."""

    def __init__(self, width: int, adds: bool = True, after: nn.Module | None = None) -> None:
        super().__init__()
        self.convolution, self.after, self.adds = nn.Conv2d(width, width, 3, padding=1), after or nn.Identity(), adds

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.convolution(x) * scale
        return self.after(x + y) if self.adds else self.after(y)


class Scattered(nn.Module):
    """Blocks outside any sequence, a position embedding that is added but is no branch, and a module without a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.place = nn.Parameter(torch.randn(1, 6, 8, 8))
        self.first = nn.ModuleList([Branch(6), Branch(6)])
        self.plain = Branch(6, adds=False)
        self.rectified = nn.ModuleDict({"a": Branch(6, after=nn.ReLU()), "b": Branch(6, after=nn.ReLU())})
        self.bent = Branch(6, after=nn.GELU())
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images) + self.place
        for position in range(len(self.first)):
            x = self.first[position](x, scale=0.5)
        x = torch.relu(self.plain(x))
        for block in self.rectified.values():
            x = block(x)
        return self.head(self.bent(x).mean((2, 3)))


def test_blocks_are_where_the_argument_comes_through_and_nowhere_else() -> None:
    torch.manual_seed(0)
    model, images = Scattered().eval(), torch.randn(2, 3, 8, 8)
    free = {block.name: block.stage for block in find_blocks(model, images) if not block.protected}
    assert free == {"first.0": "first", "first.1": "first", "rectified.a": "rectified", "rectified.b": "rectified"}


@pytest.mark.parametrize("name", ["first.1", "rectified.a"])
def test_leaving_a_block_out_equals_silencing_its_branch(name: str) -> None:
    torch.manual_seed(0)
    model, images = Scattered().eval(), torch.randn(2, 3, 8, 8)
    kept = {key for key in model.state_dict() if not key.startswith(name)}
    smaller = Scattered().eval()
    smaller.load_state_dict(model.state_dict())
    drop_blocks(smaller, [name], images)
    with torch.no_grad():
        for parameter in model.get_submodule(name).parameters():
            parameter.zero_()
        torch.testing.assert_close(smaller(images), model(images))
    assert set(smaller.state_dict()) == kept


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (lambda: models.resnet18(num_classes=3), 32),
        (lambda: models.mobilenet_v2(num_classes=3, width_mult=0.25), 32),
        (lambda: timm.models.VisionTransformer(16, 4, embed_dim=12, depth=2, num_heads=3, num_classes=3), 16),
        (lambda: models.SwinTransformer([4, 4], 12, [1, 1], [3, 3], [4, 4], num_classes=3), 32),
    ],
    ids=["resnet18", "mobilenet_v2", "vit", "swin"],
)
def test_tracing_finds_what_the_families_know(build, size: int) -> None:
    torch.manual_seed(0)
    model, images = build().eval(), torch.randn(1, 3, size, size)
    free = {block.name for block in find_blocks(model, images) if not block.protected}
    traced = {block.name for block in residual_blocks(model, images)}
    assert free and free <= traced
