"""Variants run together equal variants run one by one, in networks of every kind of coupling."""

import copy
import logging

import pytest
import torch
from torch import nn

from lit_prune.lab.lesion.variants import Variants, variant_losses


class Skips(nn.Module):
    """In-place activations and adds, concatenation, pooling, dropout: what a shared prefix could get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.side = nn.Conv2d(6, 6, 1, bias=False)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.5)
        self.hidden = nn.Linear(12, 7)
        self.head = nn.Linear(7, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        trunk = self.act(self.norm(self.conv(images)))
        trunk += self.side(trunk)  # in place, and the prefix of later layers
        other = self.act(self.depthwise(trunk))
        both = torch.cat([self.pool(trunk), self.pool(other)], 1)
        return self.head(self.drop(self.act(self.hidden(both.mean((2, 3))))))


class Tokens(nn.Module):
    """Attention over tokens with a learned first one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.first = nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(images), -1, -1), tokens], 1)
        return self.head(self.encoder(tokens)[:, 0])


class DataDependent(nn.Module):
    """Looks at a value while it runs: what vmap cannot map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.head = nn.Linear(5, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = self.conv(images).mean((2, 3))
        return self.head(pooled if float(pooled.sum()) > 0 else 2 * pooled)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    sizes = (7, 5)
    return [(torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 4) for n in sizes]


def randomised(net: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net.double()


def any_variants(width: int) -> Variants:
    lesions = Variants.lesions(range(width), width)
    return lesions + Variants(torch.arange(width), torch.randn(width, width).double(), torch.randn(width).double())


def losses_by_hooks(net: nn.Module, layer: str, variants: Variants, batches: list) -> torch.Tensor:
    """Losses [V, images] of one plain forward pass a variant and batch."""
    net = copy.deepcopy(net).eval()
    module, kind = net.get_submodule(layer), next(net.parameters()).dtype
    axis = 1 if isinstance(module, nn.Conv2d) else -1

    def losses(channel, weights, bias) -> torch.Tensor:
        def hook(module, inputs, output):
            values = output.movedim(axis, -1).clone()
            values[..., channel] = values @ weights.to(output) + bias.to(output)
            return values.movedim(-1, axis)

        handle = module.register_forward_hook(hook)
        found = [nn.functional.cross_entropy(net(x.to(kind)), y, reduction="none").detach() for x, y in batches]
        handle.remove()
        return torch.cat(found)

    rows = zip(variants.channels, variants.weights, variants.bias, strict=True)
    return torch.stack([losses(*row) for row in rows]).double()


LAYERS = {
    Skips: ("conv", "side", "depthwise", "hidden", "head"),
    Tokens: ("embed", "encoder.layers.0.linear1", "encoder.layers.1.linear2", "head"),
}


@pytest.mark.parametrize(("network", "layer"), [(net, layer) for net, layers in LAYERS.items() for layer in layers])
@pytest.mark.parametrize("values", [1, 10_000_000])
def test_together_equals_one_by_one(network, layer, values, batches, caplog):
    net = randomised(network())
    variants = any_variants(net.get_submodule(layer).weight.shape[0])
    with caplog.at_level(logging.WARNING):
        found = variant_losses(net, layer, variants, batches, values)
    assert not caplog.records
    torch.testing.assert_close(found, losses_by_hooks(net, layer, variants, batches), rtol=1e-12, atol=1e-13)


def test_lesion_is_the_plain_hook_that_sets_a_channel_to_zero(tiny_net, batches):
    def zero(channel):
        def hook(module, inputs, output):
            output = output.clone()
            output[:, channel] = 0
            return output

        return hook

    for layer, width in (("stem.0", 6), ("conv1", 8), ("conv2", 6)):
        found = variant_losses(tiny_net, layer, Variants.lesions(range(width), width), batches)
        for channel in range(width):
            handle = tiny_net.get_submodule(layer).register_forward_hook(zero(channel))
            with torch.no_grad():
                losses = [nn.functional.cross_entropy(tiny_net(x), y, reduction="sum") for x, y in batches]
            handle.remove()
            assert float(found[channel].mean()) == pytest.approx(float(sum(losses)) / 12, abs=1e-6)


def test_replacement_by_the_channel_itself_changes_nothing(tiny_net, batches):
    own = Variants(torch.arange(8), torch.eye(8).double(), torch.zeros(8).double())
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(tiny_net(x), y, reduction="sum") for x, y in batches]
    expected = torch.full((9,), float(sum(losses)) / 12, dtype=torch.float64)
    found = torch.cat([variant_losses(tiny_net, "conv1", one, batches) for one in (own, Variants.whole(8))])
    torch.testing.assert_close(found.mean(1), expected, atol=1e-6, rtol=0)


def test_what_comes_before_the_layer_runs_once_for_all_variants(tiny_net, batches):
    before, after = [], []
    handles = [
        tiny_net.stem.register_forward_hook(lambda module, inputs, output: before.append(output.shape)),
        tiny_net.bn2.register_forward_hook(lambda module, inputs, output: after.append(output)),
    ]
    variant_losses(tiny_net, "conv2", Variants.lesions(range(6), 6), batches[:1], 10_000_000, task="classification")
    for handle in handles:
        handle.remove()
    assert len(before) == 5  # one to size the batches, two by one and once together to compare, once for all
    assert torch._C._functorch.is_batchedtensor(after[-1])


def test_a_network_that_cannot_be_mapped_runs_one_by_one_and_says_so(batches, caplog):
    net = randomised(DataDependent())
    variants = any_variants(5)
    with caplog.at_level(logging.WARNING):
        found = variant_losses(net, "conv", variants, batches)
    assert "one by one" in caplog.text
    torch.testing.assert_close(found, losses_by_hooks(net, "conv", variants, batches))


def test_the_network_is_left_as_found(tiny_net, batches):
    tiny_net.train()
    before = {name: value.clone() for name, value in tiny_net.state_dict().items()}
    variant_losses(tiny_net, "conv1", Variants.lesions(range(8), 8), batches)
    assert tiny_net.bn1.training and not any(module._forward_hooks for module in tiny_net.modules())
    assert all(torch.equal(value, before[name]) for name, value in tiny_net.state_dict().items())
