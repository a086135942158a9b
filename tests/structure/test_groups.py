"""Groups say the truth: a pruned network is the dense one whose removed channels are zero wherever they are read."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from lit_prune.errors import InputError
from lit_prune.structure import ChannelGraph, check_invariants, trace_groups


class FunctionalPadNet(nn.Module):
    """Option A with a functional channel padding between two stages: 4 channels, then 8 with 2 zeros on each side."""

    def __init__(self, before: int = 2) -> None:
        super().__init__()
        self.before = before
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.inner1 = nn.Conv2d(4, 6, 3, padding=1)
        self.inner2 = nn.Conv2d(6, 4, 3, padding=1)
        self.down1 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(6, 8, 3, padding=1)
        self.linear = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        trunk = F.relu(self.bn1(self.conv1(images)))
        trunk = F.relu(trunk + self.inner2(F.relu(self.inner1(trunk))))
        padded = F.pad(trunk[:, :, ::2, ::2], (0, 0, 0, 0, self.before, 4 - self.before))
        trunk = F.relu(padded + self.down2(F.relu(self.down1(trunk))))
        return self.linear(trunk.mean((2, 3)))


class ShuffleNet(nn.Module):
    """A channel shuffle between two convolutions, and a plain pair after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 5, 3, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv1(images)
        batch, channels, height, width = features.shape
        shuffled = features.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(features.shape)
        return self.head(self.conv3(F.relu(self.conv2(F.relu(shuffled)))).mean((2, 3)))


class InputNet(nn.Module):
    """The input is added to one convolution's output and concatenated with another's."""

    def __init__(self) -> None:
        super().__init__()
        self.added = nn.Conv2d(3, 3, 3, padding=1)
        self.beside = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(7, 5, 3, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.cat([F.relu(self.beside(images + self.added(images))), images], 1)
        return self.head(F.relu(self.last(features)).mean((2, 3)))


def random_removal(graph: ChannelGraph, share: float = 0.4) -> dict[str, list[int]]:
    """A random part of the units of every prunable group that has two at least."""
    draw = np.random.default_rng(0)
    channels = [group for group in graph.prunable if group.role in ("mid", "planes")]
    counts = {group.name: min(max(1, int(share * group.size)), group.size - 1) for group in channels}
    sizes = {group.name: group.size for group in graph.groups}
    return {name: sorted(draw.choice(sizes[name], n, replace=False).tolist()) for name, n in counts.items() if n}


def zeroed_output(model: nn.Module, images: Tensor, graph: ChannelGraph, removed: dict[str, list[int]]) -> Tensor:
    """Output of the dense network when every layer and norm writes zeros for the removed channels.

    Only where a channel is written comes from the graph; how it travels and who reads it is the dense network's own.
    """
    handles = []
    for name, units in removed.items():
        for member in graph.by_name[name].members:
            module = dict(model.named_modules()).get(member.module)
            if member.axis == "out" and module is not None:
                positions = [p for unit in units for p in member.positions[unit]]
                handles.append(module.register_forward_hook(_zero(positions, isinstance(module, nn.Linear))))
    with torch.no_grad():
        output = model(images)
    for handle in handles:
        handle.remove()
    return output


def _zero(positions: list[int], last: bool):
    return lambda module, args, output: output.index_fill(-1 if last else 1, torch.tensor(positions), 0.0)


NAMES = ("resnet18", "cifar_resnet20", "wide_stem", "convnet", "vgg11_bn", "alexnet", "mobilenet_v2", "efficientnet")
NAMES += ("densenet", "squeezenet", "mixed", "vit", "deit", "convnext")


@pytest.mark.parametrize("name", NAMES)
def test_pruned_network_equals_dense_network_with_removed_channels_zeroed(build, name: str) -> None:
    model, images = build(name)
    graph = trace_groups(model, images)
    removed = random_removal(graph)
    expected = zeroed_output(model, images, graph, removed)
    graph.remove(model, removed)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20", "mobilenet_v2", "mixed"])
def test_every_channel_that_is_not_output_or_input_is_prunable(build, name: str) -> None:
    model, images = build(name)
    graph = trace_groups(model, images)
    assert [group.protected for group in graph.groups if group.protected] == ["it is the network's output"]
    written = {
        (m.module, p) for g in graph.groups for m in g.members if m.axis == "out" for u in m.positions for p in u
    }
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d)}
    assert {(n, p) for n, m in layers.items() for p in range(len(m.weight))} <= written


def test_zeros_of_a_functional_channel_padding_stay_and_what_is_beside_them_goes() -> None:
    torch.manual_seed(0)
    for before in (2, 0):
        model, images = FunctionalPadNet(before).eval(), torch.randn(2, 3, 8, 8)
        graph = trace_groups(model, images)
        assert {group.name for group in graph.prunable} == {"conv1", "inner1", "down1"}
        assert [group.size for group in graph.groups if "padding" in group.protected] == [4]
        removed = random_removal(graph)
        expected = zeroed_output(model, images, graph, removed)
        graph.remove(model, removed)
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)


def test_shuffled_channels_go_with_their_place_in_every_row() -> None:
    torch.manual_seed(0)
    model, images = ShuffleNet().eval(), torch.randn(2, 3, 8, 8)
    graph = trace_groups(model, images)
    assert {group.name: group.size for group in graph.prunable} == {"conv1": 4, "conv2": 6, "conv3": 5}
    assert graph.by_name["conv1"].members[0].positions == ((0, 4), (1, 5), (2, 6), (3, 7))
    removed = random_removal(graph)
    expected = zeroed_output(model, images, graph, removed)
    graph.remove(model, removed)
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)


def test_channels_joined_with_the_input_are_protected() -> None:
    torch.manual_seed(0)
    model, images = InputNet().eval(), torch.randn(2, 3, 8, 8)
    graph = trace_groups(model, images)
    assert "input" in graph.by_name["added"].protected
    removed = random_removal(graph)
    expected = zeroed_output(model, images, graph, removed)
    graph.remove(model, removed)
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("module", "word"),
    [
        (nn.GroupNorm(1, 8), "GroupNorm"),
        (nn.ConvTranspose2d(8, 8, 3, groups=2), "grouped"),
        (nn.LocalResponseNorm(3), "positions"),
        (nn.InstanceNorm2d(8, track_running_stats=True), "statistics"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), "reparametrised"),
    ],
)
def test_layers_that_mix_or_cannot_be_cut_protect_their_channels(module: nn.Module, word: str) -> None:
    tail = nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    images = torch.randn(1, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), module, *tail).to(images.device)
    graph = trace_groups(model, images)
    assert word in graph.by_name["0"].protected
    assert graph.by_name["3"].protected == ""


def test_layers_that_share_their_weight_are_cut_together_and_go_on_sharing_it() -> None:
    torch.manual_seed(0)
    hidden = [nn.Linear(6, 6, bias=False) for _ in range(2)]
    hidden[1].weight = hidden[0].weight
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), hidden[0], nn.Tanh(), hidden[1], nn.Tanh(), nn.Linear(6, 2))
    inputs = torch.randn(4, 5)
    graph = trace_groups(model, inputs)
    assert [(group.name, group.size) for group in graph.prunable] == [("0", 6)]
    expected = zeroed_output(model, inputs, graph, {"0": [1, 4]})
    graph.remove(model, {"0": [1, 4]})
    torch.testing.assert_close(model(inputs), expected)
    assert model[2].weight is model[4].weight and model[2].weight.shape == (4, 4)


def test_a_shared_weight_that_reads_the_input_stays() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    graph = trace_groups(model, torch.randn(1, 6))
    assert not graph.prunable and "input" in graph.by_name["0"].protected


@pytest.mark.parametrize("name", ["vit", "deit", "convnext"])
def test_transformers_and_convnext_lose_mlp_width_and_heads(build, name: str) -> None:
    model, images = build(name)
    graph = trace_groups(model, images)
    assert graph.prunable
    assert any(group.role == "heads" for group in graph.prunable) == (name != "convnext")
    assert [group for group in graph.prunable if group.role == "width"]
    for group in (group for group in graph.prunable if group.role == "mid"):
        (producer,), (consumer,) = group.producers, group.consumers
        assert isinstance(model.get_submodule(producer), nn.Linear)
        assert group.size == model.get_submodule(consumer).in_features == model.get_submodule(producer).out_features


def _state(model: nn.Module) -> dict:
    return {
        "modes": [module.training for module in model.modules()],
        "required": [parameter.requires_grad for parameter in model.parameters()],
        "identities": [id(parameter) for parameter in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "hooks": [len(module._forward_hooks) for module in model.modules()],
    }


@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference_mode"])
def test_tracing_leaves_the_model_and_the_random_state_as_found(build, mode: str) -> None:
    model, images = build("cifar_resnet20")
    seen = []
    model.layer1.register_forward_hook(lambda *_: seen.append(1))
    model.train()
    model.layer2.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.linear.weight.requires_grad_(True)
    model.linear.weight.grad = torch.ones_like(model.linear.weight)
    before, random_state = _state(model), torch.get_rng_state()
    with {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]():
        graph = trace_groups(model, images)
    after = _state(model)
    assert len(graph.prunable) == 12
    assert not seen
    for key in ("modes", "required", "identities", "hooks"):
        assert before[key] == after[key], key
    torch.testing.assert_close(before["grads"], after["grads"], rtol=0, atol=0)
    torch.testing.assert_close(before["values"], after["values"], rtol=0, atol=0)
    assert torch.equal(random_state, torch.get_rng_state())


def test_removal_keeps_flags_and_memory_format_and_updates_attributes(build) -> None:
    model, images = build("mixed")
    model = model.to(memory_format=torch.channels_last).train()
    model.right.eval()
    model.left.weight.requires_grad_(False)
    graph = trace_groups(model, images)
    graph.remove(model, {"up": [0, 3], "wide": [1], "right": [2]})
    assert (model.up.in_channels, model.up.out_channels) == (7, 5)
    assert (model.depthwise.groups, model.depthwise.in_channels, model.norm.num_features) == (5, 5, 5)
    assert (model.hidden.in_features, model.prelu.num_parameters, tuple(model.scale.shape)) == (20, 7, (7, 1, 1))
    assert not model.left.weight.requires_grad and model.right.weight.requires_grad
    assert model.training and not model.right.training
    assert model.left.weight.is_contiguous(memory_format=torch.channels_last)
    model(images).sum().backward()


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        ({}, "removes no channel"),
        ({"conv1": []}, "removes no channel"),
        ({"convx": [0]}, "did you mean"),
        ({"linear": [0]}, "protected"),
        ({"layer1.0.conv1": [16]}, "units 0 to 15"),
        ({"layer1.0.conv1": range(16)}, "keep one"),
    ],
)
def test_wrong_removals_are_named(build, removed: dict, words: str) -> None:
    model, images = build("cifar_resnet20")
    with pytest.raises(InputError, match=words):
        trace_groups(model, images).remove(model, removed)


def test_a_network_that_does_not_take_the_image_is_an_input_error(build) -> None:
    with pytest.raises(InputError, match="1, 5, 32, 32"):
        trace_groups(build("convnet")[0], torch.randn(1, 5, 32, 32))


class Choice(nn.Module):
    """What `decide` says of the trunk chooses between two layers, or only whether an error is raised."""

    def __init__(self, decide, between: bool) -> None:
        super().__init__()
        self.trunk, self.low, self.high = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 1)
        self.head, self.decide, self.between = nn.Conv2d(5, 2, 1), decide, between

    def forward(self, images: Tensor) -> Tensor:
        seen = F.relu(self.trunk(images))
        yes = bool(self.decide(seen))
        if self.between:
            return self.head(self.high(seen) if yes else self.low(seen))
        if not yes:
            raise ValueError("the input is not one")
        return self.head(self.high(seen))


@pytest.mark.parametrize("decide", [lambda seen: seen.mean() > 0.3, lambda seen: (seen < 0.1).all()])
def test_a_network_whose_layers_are_chosen_by_the_data_is_refused_in_one_line(decide) -> None:
    with pytest.raises(InputError, match="whether layer '(high|low)' runs depends on values of the input") as raised:
        trace_groups(Choice(decide, between=True).eval(), torch.randn(1, 3, 4, 4))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "model",
    [
        Choice(lambda seen: seen.isfinite().all(), between=False),
        Choice(lambda seen: torch.ones(3).sum() > 1, between=True),
    ],
    ids=["a check of the input", "a choice without it"],
)
def test_decisions_that_are_the_same_for_all_inputs_are_none(model: nn.Module) -> None:
    assert "high" in {group.name for group in trace_groups(model.eval(), torch.randn(1, 3, 4, 4)).prunable}


def test_roles_follow_the_blocks(build) -> None:
    roles = {}
    for name in ("resnet18", "cifar_resnet20", "mobilenet_v2", "efficientnet", "vgg11_bn"):
        model, images = build(name)
        roles[name] = {group.name: group.role for group in trace_groups(model, images).prunable}
    for name in ("resnet18", "cifar_resnet20"):
        assert all((role == "mid") == (".conv1" in group) for group, role in roles[name].items())
    for group, role in roles["mobilenet_v2"].items():
        projection = group == "features.1.conv.1" or group.endswith("conv.2")
        assert (role == "planes") == projection, group
    assert set(roles["vgg11_bn"].values()) == {"mid"}
    assert all(role == "mid" for group, role in roles["efficientnet"].items() if ".se." in group)


def test_stem_read_by_block_and_projection_shortcut_is_trunk() -> None:
    graph = trace_groups(models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1]), torch.randn(1, 3, 32, 32))
    assert {group.name for group in graph.prunable if group.role == "planes"} == {
        *("conv1", "layer1.0.conv3", "layer2.0.conv3", "layer3.0.conv3", "layer4.0.conv3")
    }


def test_a_broken_residual_is_named(build) -> None:
    model, images = build("resnet18")
    graph = trace_groups(model, images)
    check_invariants(model, graph)
    model.layer2[0].downsample[0] = nn.Conv2d(64, 100, 1, stride=2, bias=False)
    with pytest.raises(RuntimeError, match=r"layer2\.0\.downsample\.0"):
        check_invariants(model, graph)


def test_places_that_are_computed_from_values_say_where_values_go() -> None:
    """A detector's boxes are picked by the scores that go with them."""

    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.scores, self.boxes = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 1, 1), nn.Conv2d(6, 4, 1)

        def forward(self, images):
            seen = torch.relu(self.trunk(images))
            best = self.scores(seen).flatten().topk(3).indices
            return self.boxes(seen).movedim(1, -1).reshape(-1, 4)[best]

    graph = trace_groups(Picks().eval(), torch.randn(1, 3, 4, 4))
    assert [group.name for group in graph.prunable] == ["trunk"]


class TurnedInPlace(nn.Module):
    """Features that are turned without a copy, as recurrent layers do it where the batch comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, values: Tensor) -> Tensor:
        found = self.second(F.relu(self.first(values))).transpose(0, 1).clone()
        return self.head(found.transpose_(0, 1).unsqueeze_(0).squeeze_(0).mean(1))


def test_what_is_turned_in_place_is_followed():
    graph = trace_groups(TurnedInPlace(), torch.randn(2, 4, 3))
    assert {group.name for group in graph.prunable} == {"first", "second"}


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("both", [False, True])
def test_layers_beside_recurrent_ones_can_go(kind, both):
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
            self.recurrent = kind(6, 5, batch_first=True, bidirectional=both)
            self.second, self.head = nn.Linear(5 * (1 + both), 4), nn.Linear(4, 2)

        def forward(self, values: Tensor) -> Tensor:
            return self.head(self.second(self.recurrent(self.first(values))[0].mean(1)).relu())

    prunable = {group.name for group in trace_groups(Network(), torch.randn(2, 7, 3)).prunable}
    assert prunable == {"first.0", "second"}
