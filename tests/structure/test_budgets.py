"""A budget counts whatever a class says; the arithmetic of widths does the rest."""

import numpy as np
import pytest
import torch

from lit_prune import cost, make_plan
from lit_prune.errors import InputError
from lit_prune.structure.budgets import BUDGETS, Quantity, find_budget, register_budget


def ranks_of(model):
    return {
        name: module.weight.detach().flatten(1).norm(dim=1)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    }


def test_a_quantity_of_ones_own_is_a_budget(tiny_net):
    """Picojoules: a MAC costs as much as three parameters read; between the two built-in shares."""

    @register_budget("energy_of_a_test")
    class Energy(Quantity):
        def whole(self, cost_model, widths: np.ndarray) -> int:
            return cost_model.macs(widths) + 3 * cost_model.params(widths)

    try:
        image = torch.zeros(1, 3, 8, 8)
        plan = make_plan(tiny_net, ranks_of(tiny_net), image, budget="energy_of_a_test", keep=0.5)
    finally:
        del BUDGETS["energy_of_a_test"]
    assert plan.notes["budget"] == "energy_of_a_test"
    assert 0.3 < plan.notes["achieved"] <= 0.5


def test_what_is_counted_of_a_network_is_what_cost_says(tiny_net):
    image = torch.zeros(1, 3, 8, 8)
    found = cost(tiny_net, image)
    assert find_budget("macs").of(tiny_net, image) == found.macs
    assert find_budget("params").of(tiny_net, image) == found.params


def test_an_unknown_budget_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="budget='mac' is unknown: did you mean macs"):
        find_budget("mac")
