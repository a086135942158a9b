"""What optimizers remember over a cut: any optimizer, not those alone whose state has the parameters' shapes."""

import warnings

import pytest
import torch
from torch import nn

from lit_prune.structure import Plan, apply_plan
from lit_prune.structure.surgery import transfer_tensors
from lit_prune.train.optimizer_state import restore_state, state_by_name

IMAGES = torch.randn(4, 3, 6, 6)
PLAN = Plan((), {"0": (1, 4, 6)}, {"0": 8})
KEPT = [1, 4, 6]


class Whitening(torch.optim.SGD):
    """Keeps a list of matrices for each weight, as preconditioned methods do."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state.setdefault("factors", [torch.eye(n) for n in parameter.shape] if parameter.ndim > 1 else [])
            state["steps"] = state.get("steps", 0) + 1
        super().step()


def step(optimizer, net):
    def loss():
        optimizer.zero_grad()
        found = net(IMAGES).square().mean()
        found.backward()
        return found

    optimizer.step(loss) if isinstance(optimizer, torch.optim.LBFGS) else (loss(), optimizer.step())
    return optimizer


def carried(make):
    """The optimizer's states by name before a cut, and the optimizer of the cut network with what it was given."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    states = state_by_name(net, step(make(net.parameters()), net))
    small = apply_plan(net, PLAN, IMAGES)
    optimizer = make(small.parameters())
    restore_state(small, optimizer, states, lambda tensors: transfer_tensors(net, PLAN, IMAGES, tensors))
    named = {name: optimizer.state.get(parameter, {}) for name, parameter in small.named_parameters()}
    return states, named, small, optimizer


def test_factored_moments_are_cut_along_the_dimensions_that_they_have():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before, after, small, _ = carried(lambda p: torch.optim.Adafactor(p, lr=1e-2))
    for key in ("row_var", "col_var"):
        assert torch.equal(after["0.weight"][key], before["0.weight"].values[key][KEPT])
        assert torch.equal(after["2.weight"][key], before["2.weight"].values[key][:, KEPT])
        assert 1 in after["0.weight"][key].shape
    assert torch.equal(after["0.bias"]["variance"], before["0.bias"].values["variance"][KEPT])
    made = step(torch.optim.Adafactor(small.parameters(), lr=1e-2), small)
    weights = {name: parameter for name, parameter in small.named_parameters() if parameter.ndim > 1}
    assert all(made.state[p]["row_var"].shape == after[name]["row_var"].shape for name, p in weights.items())


@pytest.mark.parametrize(
    ("make", "lost"),
    [(torch.optim.LBFGS, {"0.weight"}), (lambda p: Whitening(p, lr=1e-2), {"0.weight", "2.weight"})],
    ids=["flat history", "preconditioners"],
)
def test_state_that_cannot_follow_is_forgotten_and_said_and_the_next_step_works(make, lost):
    with pytest.warns(UserWarning, match=rf"begins anew \({', '.join(sorted(lost))}\)"):
        before, after, small, optimizer = carried(make)
    assert {name for name in before if not after[name]} == lost
    old = [parameter.clone() for parameter in small.parameters()]
    step(optimizer, small)
    assert not any(torch.equal(a, b) for a, b in zip(old, small.parameters(), strict=True))
