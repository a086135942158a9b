"""A copy agrees with its network if all products read the same, whatever they would give."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lit_prune.structure.agreement import Agreement, Disagreement
from lit_prune.structure.cutting import cut_layer
from lit_prune.structure.example import Example
from lit_prune.structure.tracing import copy_network

KEPT, GONE = [0, 3, 4], [1, 2, 5]
LOST = {("0", "out"): GONE, ("1", "out"): GONE, ("3", "in"): GONE}


def answers(model: nn.Module, sample: Example) -> list[Tensor]:
    with torch.no_grad():
        return [model(*sample.args)]


def agreed(change: Callable[[nn.Module], None], values: float | None = None) -> list[Tensor]:
    """What the network answers to noise, held against a copy with a change; `values` for all kernels of both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 4, 1), nn.Flatten()).eval()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    for layer in (model[0], model[3]) if values is not None else ():
        nn.init.constant_(layer.weight, values)
    small, sample = copy_network(model), Example((torch.randn(1, 3, 5, 5),))
    for (name, axis), positions in LOST.items():
        cut_layer(small, name, axis, positions)
    change(small)
    agreement = Agreement(model, LOST)
    agreement.note(small, sample, answers)
    return agreement.check(model, sample, answers)


def test_a_right_copy_agrees_and_no_product_is_computed() -> None:
    found = [agreed(lambda small: None, values)[0] for values in (None, torch.nan)]
    assert found[0].isfinite().all() and torch.equal(*found)


CHANGES = {
    "scales in another order": lambda small: small[1].weight.data.copy_(small[1].weight.data.roll(1)),
    "another bias": lambda small: small[3].bias.data.add_(1),
    "another function in between": lambda small: small.__setitem__(2, nn.ReLU()),
    "a layer less": lambda small: small.__setitem__(3, nn.Identity()),
    "another shape": lambda small: small.__setitem__(4, nn.Flatten(2)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_copy_that_differs_between_products_disagrees(name: str) -> None:
    with pytest.raises(Disagreement):
        agreed(CHANGES[name])
