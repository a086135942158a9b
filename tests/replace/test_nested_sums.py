"""Sums of sums, as the top-down maps of RefineNet and DPT: the outer one reads a layer that ran before the inner's."""

import torch
from torch import nn

from lit_prune.replace import Replacement, replace_mechanisms
from lit_prune.replace.flow import observe
from lit_prune.structure import Plan


def two_layers() -> nn.Sequential:
    """Whose hidden channel 5 is channel 4."""
    found = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1))
    for values in (found[0].weight.data, found[0].bias.data):
        values[5] = values[4]
    return found


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deep, self.near, self.head = two_layers(), two_layers(), nn.Conv2d(3, 4, 1)

    def forward(self, images):
        deep = self.deep(images)
        return self.head(torch.relu(deep + (self.near(images) + images)))


def test_passes_come_to_sums_in_the_order_in_which_they_are_added_and_solve_what_can_be_solved():
    torch.manual_seed(0)
    net, images = Nested().double().eval(), torch.randn(64, 3, 4, 4, dtype=torch.float64)
    stops = observe(net, images).stops({"deep.2", "near.2", "head"})
    assert [(stop.layer, stop.joined) for stop in stops] == [("near.2", True), ("deep.2", True), ("head", False)]
    kept = dict.fromkeys(("deep.0", "near.0"), tuple(range(5)))
    plan = Plan(keep_channels=kept, sizes=dict.fromkeys(kept, 6))
    small = replace_mechanisms(net, plan, [images], "refit", settings=Replacement(ridge=1e-12)).model
    torch.testing.assert_close(small(images), net(images), rtol=1e-6, atol=1e-6)
