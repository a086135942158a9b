"""A plan that is offered can be carried out, and computes what the dense network computes without its channels."""

from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import weight_norm
from torchvision.models import googlenet, resnet18
from torchvision.ops.misc import FrozenBatchNorm2d

from lit_prune.errors import InputError
from lit_prune.running import EXACT, MATMUL, OTHERS, PRECISION
from lit_prune.structure import Plan, apply_plan, cost, make_plan, trace_groups, trial
from lit_prune.structure.reasons import MISLED
from lit_prune.structure.trial import DIFFERS, FAILS, TRAINING


class Net(nn.Module):
    """Three convolutions, a join between the first two that a test chooses, and a head."""

    def __init__(self, join: Callable[[nn.Module, Tensor], Tensor], reads: int = 16, **layers: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(reads, 12, 3, padding=1)
        self.third, self.head = nn.Conv2d(12, 10, 3, padding=1), nn.Linear(10, 4)
        self.join = join
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, images: Tensor) -> Tensor:
        features = F.silu(self.second(self.join(self, self.first(images))))
        return self.head(F.silu(self.third(features)).mean((2, 3)))


class Standardised(nn.Conv2d):
    """A convolution whose kernels are standardised over all of their inputs."""

    def forward(self, values: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return self._conv_forward(values, (self.weight - mean) / deviation, self.bias)


def gate(net: nn.Module, values: Tensor) -> Tensor:
    left, right = values.chunk(2, 1)
    return left * right


class Steps(nn.Module):
    """A buffer with one value for each channel, as observers and normalisations keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(16) + 0.5)

    def forward(self, values: Tensor) -> Tensor:
        return values * self.scale.view(1, -1, 1, 1)


def sliced(net: nn.Module, values: Tensor) -> Tensor:
    return torch.cat([values[:, :5], 2 * values[:, 5:]], 1)


def helped(net: nn.Module, values: Tensor) -> Tensor:
    net.said = net.helper(values.mean((2, 3))) if net.training else None
    return values


def kept(net: nn.Module, values: Tensor) -> Tensor:
    net.activation = values
    return values


JOINS = {
    "halves multiplied": (lambda: Net(gate, 8), set()),
    "pixel shuffle": (lambda: Net(lambda net, values: F.pixel_shuffle(values, 2), 4), set()),
    "slices by position": (lambda: Net(sliced), {"first"}),
    "view to a number": (lambda: Net(lambda net, values: values.view(len(values), 16, 8, 8)), {"first"}),
    "glu": (lambda: Net(lambda net, values: F.glu(values, 1), 8), set()),
    "weight standardisation": (lambda: Net(lambda net, v: v, second=Standardised(16, 12, 3, padding=1)), {"first"}),
    "head in training alone": (lambda: Net(helped, helper=nn.Linear(16, 4)), set()),
    "view in training alone": (lambda: Net(lambda net, v: v.view(-1, 16, 8, 8) if net.training else v), {"first"}),
    "kept activation": (lambda: Net(kept), set()),
    "weight norm": (lambda: Net(lambda net, v: v, second=weight_norm(nn.Conv2d(16, 12, 3, padding=1))), None),
    "frozen norm": (lambda: Net(lambda net, v: net.norm(v), norm=FrozenBatchNorm2d(16)), set()),
    "grouped": (
        lambda: Net(lambda net, v: net.mix(v), mix=nn.Conv2d(16, 16, 3, padding=1, groups=4)),
        set(),
    ),
    "few wide groups": (lambda: Net(lambda net, v: net.mix(v), mix=nn.Conv2d(16, 16, 3, padding=1, groups=2)), set()),
    "group norm": (lambda: Net(lambda net, values: net.norm(values), norm=nn.GroupNorm(8, 16)), set()),
    "norm over all channels": (lambda: Net(lambda net, values: net.norm(values), norm=nn.GroupNorm(1, 16)), {"first"}),
    "pixel unshuffle": (lambda: Net(lambda net, values: F.pixel_unshuffle(values, 2), 64), set()),
    "channel shuffle": (lambda: Net(lambda net, values: F.channel_shuffle(values, 4)), set()),
    "one of several channels": (lambda: Net(lambda net, values: values * values[:, :1]), {"first"}),
    "sum over channels": (lambda: Net(lambda net, values: values * values.sum(1, keepdim=True)), {"first"}),
    "a buffer of their width": (lambda: Net(lambda net, v: net.steps(v), steps=Steps()), set()),
}  # name -> network, groups that must be protected (None: not asked)


@pytest.mark.parametrize("name", JOINS)
def test_what_is_offered_can_be_cut_and_equals_the_silenced_network(name: str, random_ranks) -> None:
    torch.manual_seed(0)
    build, forbidden = JOINS[name]
    model = build().eval()
    images = torch.randn(2, 3, 8, 8)
    model(images)
    graph = trace_groups(model, images)
    protected = {group.name.partition(":")[0] for group in graph.groups if group.protected}
    if forbidden is not None:
        assert forbidden == protected - {"head", "helper"}
    plan = make_plan(model, random_ranks(model), images, budget="channels", keep=0.6, allocation="uniform")
    small = apply_plan(model, plan, images)
    removed = graph.removed_positions({group: plan.removed(group) for group in plan.keep_channels})
    handles = [
        model.get_submodule(module).register_forward_pre_hook(_zeros(positions))
        for (module, axis), positions in removed.items()
        if axis == "in"
    ]
    expected = model(images)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(small(images), expected, rtol=1e-4, atol=1e-5)
    small.train()(images)
    assert any(not group.protected for group in graph.groups)


def _zeros(positions: list[int]):
    def hook(module: nn.Module, args: tuple) -> tuple:
        values = args[0].clone()
        values[:, positions] = 0
        return (values,)

    return hook


def test_what_only_training_does_with_a_number_of_channels_is_said() -> None:
    model = Net(lambda net, values: values.view(-1, 16, 8, 8) if net.training else values).eval()
    assert trace_groups(model, torch.randn(1, 3, 8, 8)).by_name["first"].protected == TRAINING


def test_a_head_that_runs_in_training_alone_loses_the_channels_that_it_reads() -> None:
    model = Net(helped, helper=nn.Linear(16, 4)).eval()
    images = torch.randn(1, 3, 8, 8)
    small = apply_plan(model, Plan(keep_channels={"first": (1, 2, 11)}, sizes={"first": 16}), images)
    torch.testing.assert_close(small.helper.weight, model.helper.weight[:, [1, 2, 11]])


def test_a_head_that_reads_other_channels_in_training_than_it_seems_to_keeps_them(monkeypatch) -> None:
    monkeypatch.setattr("lit_prune.structure.following.Follower._move", _unmoved)
    model = Net(lambda net, values: helped(net, values.flip(1)) if net.training else values, helper=nn.Linear(16, 4))
    assert trace_groups(model.eval(), torch.randn(1, 3, 8, 8)).by_name["first"].protected == MISLED


def _unmoved(follower, name: str, function: object, args: tuple, kwargs: dict, output: Tensor) -> None:
    """A rule with a mistake: it leaves labels where they are."""
    follower.put(output, follower.shadow(args[0]).reshape(output.shape))


def test_auxiliary_heads_of_googlenet_are_cut_with_what_they_read() -> None:
    model = googlenet(num_classes=10, init_weights=False).eval()
    images = torch.randn(2, 3, 64, 64)
    graph = trace_groups(model, images)
    assert {group.name for group in graph.groups if group.protected} == {"fc", "aux1.fc2", "aux2.fc2"}
    keep = {group.name: tuple(range(0, group.size, 2)) for group in graph.prunable}
    small = apply_plan(model, Plan(keep_channels=keep, sizes={name: graph.by_name[name].size for name in keep}), images)
    assert [len(answers) for answers in small.train()(images)] == [2, 2, 2]


class Numbered(nn.Sequential):
    """Two layers with a view to a number of channels in between."""

    def forward(self, values: Tensor) -> Tensor:
        return values + self[1](self[0](values).view(-1, 6, 8, 8))


def test_what_stops_one_block_is_sought_in_it_and_said_of_all_that_are_built_alike(monkeypatch) -> None:
    copies: list[nn.Module] = []
    copy_of = trial.sketch_network
    monkeypatch.setattr(trial, "sketch_network", lambda model: (copies.append(model), copy_of(model))[1])
    blocks = [Numbered(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)) for _ in range(8)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *blocks, nn.Conv2d(4, 3, 1)).eval()
    graph = trace_groups(model, torch.randn(1, 3, 8, 8))
    assert {group.name for group in graph.groups if group.protected == FAILS} == {f"{place}.0" for place in range(1, 9)}
    assert [type(model) for model in copies] == [nn.Sequential, Numbered, *[nn.Sequential] * 2]  # the last one trains


def test_frozen_norms_are_cut_with_their_channels() -> None:
    model = resnet18(norm_layer=FrozenBatchNorm2d, num_classes=10).eval()
    graph = trace_groups(model, torch.randn(1, 3, 32, 32))
    assert [group.name for group in graph.groups if group.protected] == ["fc"]
    small = apply_plan(
        model,
        make_plan(
            model,
            {name: m.weight.flatten(1).norm(dim=1) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)},
            torch.randn(1, 3, 32, 32),
            keep=0.5,
        ),
        torch.randn(1, 3, 32, 32),
    )
    for module in small.modules():
        if isinstance(module, FrozenBatchNorm2d):
            assert len({len(buffer) for buffer in module.buffers()}) == 1


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(F.relu(self.left(left) + self.right(right)))


@pytest.mark.parametrize("as_kwargs", [False, True])
def test_several_inputs_are_traced_cut_and_counted(as_kwargs: bool) -> None:
    torch.manual_seed(0)
    model = TwoInputs().eval()
    left, right = torch.randn(4, 6), torch.randn(4, 5)
    example = {"left": left, "right": right} if as_kwargs else (left, right)
    ranks = {"left": torch.arange(8.0), "right": torch.arange(8.0)}
    plan = make_plan(model, ranks, example, budget="channels", keep=0.5)
    small = apply_plan(model, plan, example)
    assert small.left.out_features == small.right.out_features == small.head.in_features == 4
    model.head.weight.data[:, :4] = 0
    torch.testing.assert_close(small(left, right), model(left, right))
    assert cost(small, example).macs == 6 * 4 + 5 * 4 + 4 * 3


@pytest.mark.parametrize("example", [torch.tensor(3.0), "image", (), {"images": 3}])
def test_an_example_without_a_batch_is_refused_in_one_line(example: object) -> None:
    with pytest.raises(InputError, match="example_input is"):
        trace_groups(nn.Linear(2, 2), example)


class Answering(nn.Module):
    """Two layers whose answer, in a container, is scaled by a number of channels; no product reads that."""

    def __init__(self, container: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.first, self.head, self.container = nn.Linear(6, 8), nn.Linear(8, 3), container

    def forward(self, values: Tensor) -> object:
        hidden = F.relu(self.first(values))
        return self.container(self.head(hidden) * hidden.shape[1])


@pytest.mark.parametrize(
    "container", [lambda t: t, lambda t: OrderedDict(out=t), lambda t: {"out": t}, lambda t: SimpleNamespace(out=t)]
)
def test_answers_are_compared_whatever_holds_them(container: Callable[[Tensor], object]) -> None:
    (group,) = (g for g in trace_groups(Answering(container).eval(), torch.randn(2, 6)).groups if g.name == "first")
    assert group.protected == DIFFERS


def test_answers_that_rounding_alone_changes_are_compared_in_double_precision() -> None:
    class Brittle(nn.Module):
        """Boxes chosen by score are as brittle as this."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 3)

        def forward(self, images):
            return torch.frac(self.head(torch.relu(self.body(images))) * 1e6)

    torch.manual_seed(0)
    net = Brittle().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    graph = trace_groups(net, torch.randn(1, 3, 8, 8))
    assert [group.name for group in graph.prunable] == ["body"]
    assert all(value.dtype == torch.float32 and torch.equal(value, before[n]) for n, value in net.state_dict().items())


def test_forms_of_a_network_are_compared_in_float32_whatever_is_allowed_outside() -> None:
    settings = []

    def allowed() -> list:
        return [getattr(backend, PRECISION) for backend in (*MATMUL, *OTHERS)]

    class Spied(nn.Conv2d):
        def forward(self, values: Tensor) -> Tensor:
            settings.append(allowed())
            return super().forward(values)

    net = nn.Sequential(Spied(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        outside = allowed()
        assert not set(outside) <= set(EXACT)
        apply_plan(net, make_plan(net, {"0": torch.arange(8.0)}, torch.randn(1, 3, 8, 8)), torch.randn(1, 3, 8, 8))
        assert allowed() == outside
    finally:
        torch.set_float32_matmul_precision(before)
    assert settings and all(set(found) <= set(EXACT) for found in settings)


class OnePlace(nn.Module):
    """Scales a single place by what was its width: with fewer channels it computes something else, there alone."""

    def __init__(self, place: tuple[int, int]) -> None:
        super().__init__()
        self.first, self.last, self.place = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1), place

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.first(images).relu()
        scale = torch.ones(maps.shape[-2:])
        scale[self.place] = 16 / maps.shape[1]
        return self.last(maps * scale)


@pytest.mark.parametrize("place", [(0, 0), (3, 5), (3, 6), (17, 2), (39, 39)])
def test_a_difference_at_a_single_place_protects(place: tuple[int, int]) -> None:
    torch.manual_seed(0)
    graph = trace_groups(OnePlace(place).eval(), torch.randn(1, 3, 40, 40))
    assert "computes something else" in graph.by_name["first"].protected


def test_an_example_that_hides_where_channels_go_is_refused() -> None:
    with pytest.raises(InputError, match=r"example_input of shape \[1, 3, 8, 8\] holds NaN"):
        trace_groups(nn.Conv2d(3, 4, 3), torch.full((1, 3, 8, 8), torch.nan))
