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
