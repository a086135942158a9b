"""Passes that skip products: what hangs on values is computed, and nothing that a network keeps is made up."""

import torch
from torch import Tensor, nn

from lit_prune.structure import cost, trace_groups
from lit_prune.structure.hollow import Hollow


class Decides(nn.Module):
    """Which layer runs hangs on the sign of a product."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.narrow, self.wide = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 200)
        nn.init.constant_(self.body.weight, -1.0)

    def forward(self, values: Tensor) -> Tensor:
        values = self.body(values)
        return self.narrow(values) if values.sum() < 0 else self.wide(values)


class Keeps(nn.Module):
    """A table that is made in the first pass, as of positions, and the output of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = torch.arange(1.0, 5.0)[:, None], torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.table: Tensor | None = None

    def forward(self, values: Tensor) -> Tensor:
        if self.table is None:
            self.table = self.left @ self.right
        return self.head(self.body(values) + self.table.sum(0))


def test_the_layer_that_runs_is_counted_where_values_decide() -> None:
    assert cost(Decides(), torch.ones(1, 4)).layers.keys() == {"body", "narrow"}


def test_a_table_that_a_network_keeps_is_computed() -> None:
    for work in (cost, trace_groups):
        model = Keeps()
        work(model, torch.randn(1, 4))
        assert model.table is not None
        torch.testing.assert_close(model.table, model.left @ model.right)


def test_what_is_not_computed_of_skipped_products_has_the_form_that_it_would_have() -> None:
    body, images = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    steps = {
        "gelu": nn.functional.gelu,
        "broadcast": lambda values: values[:, :, :1] + torch.ones(2, 1, 1, 6, 1),
        "permuted": lambda values: values.permute(0, 2, 3, 1) * 2,
        "copied": lambda values: values.clone(memory_format=torch.channels_last),
        "compared": lambda values: values > 0,
        "clamped": lambda values: values.clamp(min=torch.zeros(4, 1, 1)),
    }
    with torch.no_grad():
        for name, step in steps.items():
            expected = step(body(images))
            with Hollow([images]):
                found = step(body(images))
            forms = [(t.shape, t.stride(), t.dtype) for t in (found, expected)]
            assert forms[0] == forms[1], name
            assert found.dtype != torch.bool or int(found.view(torch.uint8).max()) <= 1
