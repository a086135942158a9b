"""A number of heads that does not divide is one line, wherever it comes from."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn
from torchvision import models

from lit_prune.errors import InputError
from lit_prune.models import build_network
from lit_prune.structure import Plan, apply_plan, cost, make_plan, trace_groups

IMAGES = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ATTENTION = {
    "timm": "blocks.0.attn",
    "torchvision": "encoder.layers.encoder_layer_0.self_attention",
    "swin": "features.1.0.attn",
}


def _network(name: str) -> nn.Module:
    if name == "timm":
        return timm.models.VisionTransformer(32, 8, embed_dim=24, depth=1, num_heads=4, num_classes=3)
    if name == "torchvision":
        return models.VisionTransformer(32, 8, 1, 4, 24, 48, num_classes=3)
    return models.SwinTransformer([4, 4], 24, [2], [2], [4, 4], num_classes=3)


@pytest.mark.parametrize("work", [trace_groups, cost])
@pytest.mark.parametrize("name", ATTENTION)
def test_a_stated_number_that_does_not_divide_the_width_is_named(name: str, work: Callable) -> None:
    model = _network(name)
    model.get_submodule(ATTENTION[name]).num_heads = 5
    with pytest.raises(InputError, match=f"{ATTENTION[name]} has num_heads=5, which does not divide") as raised:
        work(model, IMAGES)
    assert "\n" not in str(raised.value)


def test_no_such_network_is_built() -> None:
    path = "torchvision.models:VisionTransformer"
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 1, "num_heads": 5, "hidden_dim": 24, "mlp_dim": 24}
    with pytest.raises(InputError, match="embed_dim must be divisible by num_heads"):
        build_network(path, sizes, trust=path)


@pytest.mark.parametrize(("kept", "size"), [((0, 1), 3), ((0, 4), 6), ((0, 1, 2, 3), 5)])
def test_a_plan_for_another_number_of_heads_does_not_fit(kept: tuple[int, ...], size: int) -> None:
    plan = Plan(keep_channels={"blocks.0.attn": kept}, sizes={"blocks.0.attn": size})
    with pytest.raises(InputError, match=f"'blocks.0.attn' has 4 units, the plan says {size}"):
        apply_plan(_network("timm"), plan, IMAGES)


def test_heads_are_fewer_than_they_are_rounded_to() -> None:
    model = _network("timm")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ranks = {name: torch.rand(layer.out_features) for name, layer in layers.items()}
    with pytest.raises(InputError, match="round_to=5: none of the 1 selected groups has more units"):
        make_plan(model, ranks, IMAGES, only="heads", round_to=5)
