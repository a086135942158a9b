"""The counter against PyTorch's own, against counts by hand, and the arithmetic on widths against the counter."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from lit_prune.errors import InputError
from lit_prune.structure import Budget, CostModel, apply_plan, cost, plan_channels, trace_groups

FAMILIES = ("resnet18", "vgg11_bn", "mobilenet_v2", "densenet", "mixed", "vit", "deit", "convnext")


@pytest.mark.parametrize("name", FAMILIES)
def test_macs_are_half_the_flops_that_torch_counts(build, name: str) -> None:
    model, images = build(name)
    counted = cost(model, images)
    with FlopCounterMode(display=False) as flops:
        model(images[:1])
    assert 2 * counted.macs == flops.get_total_flops()
    assert counted.params == sum(parameter.numel() for parameter in model.parameters())
    assert counted.macs == sum(layer.macs for layer in counted.layers.values())


def test_attention_without_a_layer_is_counted() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            query, key, value = self.qkv(tokens).chunk(3, -1)
            plain = torch.softmax(query @ key.transpose(-1, -2), -1) @ value
            spelled = torch.einsum("blk,bkd->bld", torch.einsum("bld,bkd->blk", query, key), value)
            return F.scaled_dot_product_attention(query, key, value) + plain + spelled

    counted = cost(Attention(), torch.randn(3, 5, 8))
    assert counted.layers["qkv"].macs == 5 * 8 * 24
    assert counted.layers[""].macs == 3 * (2 * 5 * 5 * 8)  # three attentions, two products of 5x5x8
    assert counted.layers[""].kind == "attention"


def resnet_macs(blocks: tuple[int, ...], classes: int) -> int:
    """Basic-block ResNet with the ImageNet stem at 32x32, by hand: the stem gives 16x16, the pool 8x8."""
    macs, side, before = 16 * 16 * 7 * 7 * 3 * 64, 8, 64
    for stage, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True)):
        side = side if stage == 0 else side // 2
        positions = side * side
        macs += positions * 9 * before * width + (2 * count - 1) * positions * 9 * width * width
        macs += positions * before * width if stage else 0  # the 1x1 shortcut
        before = width
    return macs + 512 * classes


def test_sizes_of_the_known_networks() -> None:
    counted = cost(models.resnet18(num_classes=10), torch.randn(1, 3, 32, 32))
    assert (counted.params, counted.macs) == (11_181_642, resnet_macs((2, 2, 2, 2), 10))
    assert round(counted.macs / 1e9, 4) == 0.0370
    counted = cost(models.resnet34(num_classes=10), torch.randn(1, 3, 32, 32))
    assert counted.macs == resnet_macs((3, 4, 6, 3), 10)
    assert (round(counted.params / 1e6, 3), round(counted.macs / 1e9, 4)) == (21.290, 0.0748)
    counted = cost(models.mobilenet_v2(num_classes=100), torch.randn(1, 3, 64, 64))
    assert (round(counted.params / 1e6, 3), round(counted.macs / 1e9, 4)) == (2.352, 0.0246)


def test_layers_state_widths_positions_and_kind(build) -> None:
    model, images = build("mobilenet_v2")
    layers = cost(model, images).layers
    depthwise = model.features[2].conv[1][0]
    found = layers["features.2.conv.1.0"]
    assert (found.kind, found.out_channels, found.positions) == ("depthwise", depthwise.out_channels, 8 * 8)
    assert found.macs == 8 * 8 * 9 * depthwise.out_channels
    assert layers["classifier.1"].kind == "linear" and layers["classifier.1"].positions == 1


def test_batch_mode_and_training_flag_do_not_matter(build) -> None:
    model, images = build("convnet")
    with torch.inference_mode():
        assert cost(model.train(), images.repeat(3, 1, 1, 1)) == cost(model, images[:1])
    assert model.training


NAMES = ("cifar_resnet20", "wide_stem", "mobilenet_v2", "densenet", "mixed", "deit", "vit", "swin")


@pytest.mark.parametrize("name", NAMES)
def test_arithmetic_on_widths_equals_the_counter_after_surgery(build, random_ranks, name: str) -> None:
    model, images = build(name)
    graph = trace_groups(model, images)
    cost_model = CostModel.build(model, graph, images)
    dense = cost(model, images)
    assert (cost_model.macs(cost_model.sizes), cost_model.params(cost_model.sizes)) == (dense.macs, dense.params)
    draw = np.random.default_rng(0)
    for trial in range(2):
        other = ("heads", "head_width")[trial % 2]  # one plan takes heads or narrows them
        groups = [group for group in graph.prunable if group.role != other]
        keep = {group.name: float(draw.uniform(0.2, 1.0)) for group in groups}
        ranks = random_ranks(model, trial) | {g.name: torch.rand(g.size) for g in groups if "head" in g.role}
        plan = plan_channels(graph, cost_model, ranks, Budget(keep=keep, allocation="layerwise"))
        widths = cost_model.widths(plan.keep_channels)
        small = cost(apply_plan(model, plan, images), images)
        assert (cost_model.macs(widths), cost_model.params(widths)) == (small.macs, small.params)


class Folded(nn.Module):
    """Frames folded into the batch, an einsum with an ellipsis, a functional transposed convolution, a tensordot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(4, 5, 2, 2))
        self.mix = nn.Parameter(torch.randn(5, 6))

    def forward(self, clips: Tensor) -> Tensor:
        frames = self.conv(clips.flatten(0, 1))
        wide = F.conv_transpose2d(frames, self.kernel, stride=2)
        mixed = torch.einsum("...chw,cd->...dhw", wide, self.mix)
        return torch.tensordot(mixed.mean((2, 3)), self.mix.T, 1)


def test_folded_batches_and_functional_products_are_counted_as_torch_counts_them() -> None:
    model, clips = Folded().eval(), torch.randn(1, 2, 3, 8, 8)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(clips)
    assert cost(model, clips).macs == counter.get_total_flops() // 2


@pytest.mark.real  # torch.jit.trace knows no other
def test_a_compiled_network_costs_what_the_network_costs_and_a_traced_one_is_refused() -> None:
    model, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), torch.randn(1, 3, 8, 8)
    assert cost(torch.compile(model, backend="eager"), images).macs == cost(model, images).macs
    with pytest.raises(InputError, match="TorchScript"):
        cost(torch.jit.trace(model, images), images)
