"""Groups are found once for a network and its copies, and anew for whatever may have others."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_prune.structure import apply_plan, groups, make_plan, trace_groups


@dataclass
class Config:
    """As a library keeps the sizes of a network, and what it is told later."""

    width: int = 8
    kept: set[str] = field(default_factory=lambda: {"head", "body"})


class Net(nn.Module):
    """Its forward depends on a function, a list and a number that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 2)
        self.act, self.order, self.times = F.relu, ["body"], 1
        self.config = Config()
        self.register_buffer("scale", torch.arange(1.0, 9.0))

    def forward(self, values: Tensor) -> Tensor:
        for name in self.order * self.times:
            values = self.act(getattr(self, name)(values)) * self.scale
        return self.head(values)


@pytest.fixture
def traced(monkeypatch):
    """How many networks were traced."""
    seen = []
    find = groups.propose_groups
    monkeypatch.setattr(groups, "propose_groups", lambda model, sample: (seen.append(model), find(model, sample))[1])
    return seen


def _weight(net: Net) -> None:
    net.body.weight.data[3, 2] += 1e-3


CHANGES = {
    "a weight": _weight,
    "a buffer": lambda net: net.scale.mul_(2),
    "the order of a buffer": lambda net: net.scale.copy_(net.scale.flip(0)),
    "a number": lambda net: setattr(net.head, "note", 3),
    "a function": lambda net: setattr(net, "act", F.gelu),
    "a list": lambda net: net.order.append("other"),
    "a type": lambda net: setattr(net, "head", nn.Sequential(net.head)),
    "a field of its configuration": lambda net: setattr(net.config, "width", 4),
    "a set of its configuration": lambda net: net.config.kept.add("other"),
    "an attribute of its configuration": lambda net: setattr(net.config, "attention", "eager"),
    "an object": lambda net: setattr(net, "kept", object()),
}


def test_a_network_and_its_copies_are_traced_once(traced) -> None:
    net, inputs = Net(), torch.randn(3, 6)
    plan = make_plan(net, {"body": torch.arange(8.0)}, inputs, keep=0.5)
    small = apply_plan(net, plan, inputs)
    assert len(traced) == 1
    again = trace_groups(copy.deepcopy(net), inputs)
    assert len(traced) == 1 and [group.name for group in again.prunable] == ["body"]
    assert trace_groups(small, inputs).by_name["body"].size == 4
    assert len(traced) == 2


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_is_changed_is_traced_again(traced, change: str) -> None:
    net, inputs = Net(), torch.randn(3, 6)
    net.other = nn.Linear(8, 8)
    trace_groups(net, inputs)
    CHANGES[change](net)
    trace_groups(net, inputs)
    assert len(traced) == 2


def test_another_input_is_traced_again(traced) -> None:
    net = Net()
    for inputs in (torch.zeros(1, 6), torch.ones(1, 6), torch.ones(1, 6, dtype=torch.float64)):
        trace_groups(net, inputs)
    assert len(traced) == 2  # the last is read in the precision of the network


def test_networks_with_configurations_of_transformers_are_traced_once(traced) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    net = transformers.ViTForImageClassification(transformers.ViTConfig(intermediate_size=16, **sizes)).eval()
    images = torch.randn(1, 3, 16, 16)
    for network in (net, copy.deepcopy(net)):
        trace_groups(network, images)
    assert len(traced) == 1
    net.config._attn_implementation = "eager"
    trace_groups(net, images)
    assert len(traced) == 2


def test_another_forward_of_the_class_is_traced_again(traced, monkeypatch) -> None:
    net, inputs = Net(), torch.randn(3, 6)
    trace_groups(net, inputs)
    monkeypatch.setattr(Net, "forward", lambda self, values: self.head(self.body(values)))
    trace_groups(net, inputs)
    assert len(traced) == 2
