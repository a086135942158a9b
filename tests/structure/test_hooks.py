"""Hooks that a network needs stay and follow its copies; those of people who watch it see nothing."""

import functools

import pytest
import torch
from torch import Tensor, nn

import lit_prune
from lit_prune.errors import InputError
from lit_prune.structure import apply_plan, cost, trace_groups
from lit_prune.structure.tracing import copy_network, sketch_network


class Tapped(nn.Module):
    """Reads the output of its first layer from where a hook has put it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(14, 4)
        self.kept: dict[str, Tensor] = {}
        kept = self.kept

        def by_closure(module: nn.Module, args: tuple, output: Tensor) -> None:
            self.kept["first"] = output

        def by_store(module: nn.Module, args: tuple, output: Tensor) -> None:
            kept["first"] = output

        hooks = {
            "method": self._keep,
            "partial": functools.partial(self._keep_as, "first"),
            "closure": by_closure,
            "store": by_store,
        }
        self.first.register_forward_hook(hooks[kind])

    def _keep(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._keep_as("first", module, args, output)

    def _keep_as(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.kept[name] = output

    def forward(self, images: Tensor) -> Tensor:
        later = self.second(torch.relu(self.first(images)))
        early = self.kept.pop("first")
        return self.head(torch.cat([early.mean((2, 3)), later.mean((2, 3))], 1))


KINDS = ("method", "partial", "closure", "store")


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_reads_from_its_own_hook_is_cut_exactly(kind: str) -> None:
    torch.manual_seed(0)
    model, images = Tapped(kind).eval(), torch.randn(2, 3, 8, 8)
    seen: list[int] = []
    model.first.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    graph = trace_groups(model, images)
    assert {group.name: group.protected for group in graph.groups}["first"] == ""
    plan = lit_prune.Plan((), {"first": (0, 2, 3, 7)}, {"first": 8})
    small = apply_plan(model, plan, images)
    assert cost(small, images).macs < cost(model, images).macs
    assert not seen  # neither tracing nor counting showed the watcher an image
    with torch.no_grad():
        model.second.weight[:, [1, 4, 5, 6]] = 0
        model.head.weight[:, [1, 4, 5, 6]] = 0
    assert torch.allclose(small(images), model(images), atol=1e-6)
    assert not seen or set(seen) == {8}  # the cut network does not carry the watcher
    assert not model.kept and not small.kept


@pytest.mark.parametrize("copied", [copy_network, sketch_network])
@pytest.mark.parametrize("kind", KINDS)
def test_the_hook_of_a_copy_writes_into_the_copy(kind: str, copied) -> None:
    model = Tapped(kind).eval()
    twin = copied(model)
    twin.first(torch.ones(1, 3, 8, 8))
    assert "first" in twin.kept and not model.kept


def test_a_network_that_needs_somebody_elses_hook_is_refused_in_one_line() -> None:
    class Needy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, images: Tensor) -> Tensor:
            self.layer(images)
            return outside["output"]

    outside: dict[str, Tensor] = {}
    model = Needy()
    model.layer.register_forward_hook(lambda module, args, output: outside.update(output=output))
    with pytest.raises(InputError, match="output") as caught:
        trace_groups(model, torch.ones(1, 3, 8, 8))
    assert len(str(caught.value).splitlines()) == 1


class Outside:
    """Somebody who is no part of the network."""

    def __init__(self) -> None:
        self.held = torch.nn.Linear(1, 1)  # a copy of it would be told by its weights
        self.seen: list[Tensor] = []

    def double(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        assert self is OUTSIDE
        return output * 2

    def watch(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.seen.append(output)

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self.double(module, args, output)


def doubled(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output * 2


def doubled_by(factor: float, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output * factor


def by_closure(factor: float):
    return lambda module, args, output: output * factor


def turned(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output.flip(1)


OUTSIDE = Outside()
CHANGING = {
    "function": doubled,
    "method": OUTSIDE.double,
    "object": OUTSIDE,
    "closure": by_closure(2.0),
    "partial": functools.partial(doubled_by, 2.0),
    "turned": turned,
}


@pytest.mark.parametrize("kind", CHANGING)
def test_a_hook_that_changes_what_a_layer_gives_is_part_of_the_network(tiny_net, kind):
    images = torch.randn(4, 3, 8, 8)
    plain = tiny_net(images)
    tiny_net.conv1.register_forward_hook(CHANGING[kind])
    tiny_net.head.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert not torch.allclose(tiny_net(images), plain)
    group = next(group for group in trace_groups(tiny_net, images).groups if group.name == "conv1")
    assert not group.protected
    rest = [0, 3, 5, 6]
    for place in {0, 1, 2, 3, 4, 5, 6, 7} - set(rest):
        for member in group.members:
            silence(tiny_net, member, place)
    small = apply_plan(tiny_net, lit_prune.Plan((), {"conv1": tuple(rest)}, {"conv1": 8}), images)
    assert small.conv1.out_channels == 4
    torch.testing.assert_close(small(images), tiny_net(images))


def silence(model: nn.Module, member, unit: int) -> None:
    """Whoever reads a unit gets nothing of it."""
    module = model.get_submodule(member.module)
    with torch.no_grad():
        if member.axis == "in":
            module.weight[:, list(member.positions[unit])] = 0


@pytest.mark.parametrize("kind", CHANGING)
def test_compress_solves_around_hooks_that_change(tiny_net, kind):
    tiny_net.conv1.register_forward_hook(CHANGING[kind])
    images = torch.randn(64, 3, 8, 8)
    small, report = lit_prune.compress(tiny_net, [images], keep=0.8, recipe=lit_prune.Recipe(round_to=1))
    small.requires_grad_(False), tiny_net.requires_grad_(False)
    difference = (small(images) - tiny_net(images)).square().sum() / (
        tiny_net(images) - tiny_net(images).mean(0)
    ).square().sum()
    assert float(difference) == pytest.approx(report["distortion"], rel=0.1) and difference < 0.01


def test_a_network_with_no_layer_that_can_be_solved_again_is_refused_in_one_line(tiny_net):
    tiny_net.conv1.register_forward_hook(doubled)
    tiny_net.conv2.register_forward_hook(doubled)
    with pytest.raises(InputError, match="nothing to prune: .* cannot be solved again") as refused:
        lit_prune.compress(tiny_net, [torch.randn(64, 3, 8, 8)], keep=0.8)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("hook", [OUTSIDE.watch, lambda module, args, output: OUTSIDE.seen.append(output)])
def test_hooks_that_are_left_off_are_named_in_one_line(tiny_net, hook):
    images = torch.randn(4, 3, 8, 8)
    tiny_net.conv1.register_forward_hook(hook)
    with pytest.warns(UserWarning, match=r"does not run the hooks of conv1 \(.*(watch|lambda).*\)") as warned:
        small = apply_plan(tiny_net, lit_prune.Plan((), {"conv1": (0, 1, 2)}, {"conv1": 8}), images)
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    assert not small.conv1._forward_hooks
