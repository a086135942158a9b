"""Passes that skip products: what hangs on values is computed, and nothing that a network keeps is made up."""

import numpy as np
import pytest
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


class Writes(nn.Module):
    """A mean that moves in any mode, in place or not, and a table that grows to what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("moved", torch.zeros(8))
        self.register_buffer("set", torch.zeros(8))
        self.register_buffer("table", torch.zeros(0))
        self.longest = 0

    def forward(self, values: Tensor) -> Tensor:
        values = self.body(values).relu()
        self.moved.mul_(0.9).add_(values.mean(0))
        self.set = 0.9 * self.set + values.mean(0)
        if self.longest < len(values):
            self.table, self.longest = torch.arange(8.0), len(values)
        return self.head(values + self.table)


def test_buffers_that_a_network_writes_to_are_as_before_and_its_tables_there() -> None:
    for work in (cost, trace_groups):
        model = Writes().eval()
        work(model, torch.randn(1, 4))
        assert not model.moved.any() and not model.set.any()
        assert model.table.equal(torch.arange(8.0))


class Reads(nn.Module):
    """Which layer runs hangs on values that are read past torch's operations."""

    def __init__(self, read) -> None:
        super().__init__()
        self.read, self.body, self.narrow, self.wide = read, nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 200)
        nn.init.constant_(self.body.weight, -1.0)

    def forward(self, values: Tensor) -> Tensor:
        values = self.body(values)
        return self.narrow(values) if self.read(values.detach()) < 0 else self.wide(values)


@pytest.mark.parametrize(
    "read",
    [
        lambda values: values.tolist()[0][0],
        lambda values: values.numpy().sum(),
        lambda values: values.cpu().exp().log().numpy().sum(),
        lambda values: np.asarray(values).sum(),
        lambda values: torch.frexp(values.exp())[1].sum().item(),
    ],
)
def test_values_that_are_read_past_the_operations_are_computed(read) -> None:
    assert cost(Reads(read), torch.ones(1, 4)).layers.keys() == {"body", "narrow"}
    names = {group.name for group in trace_groups(Reads(read), torch.ones(1, 4)).groups}
    assert names == {"body", "narrow"}


def test_operations_that_are_not_torchs_own_meet_no_values_that_nobody_computed() -> None:
    met = []

    @torch.library.custom_op("lit_prune_test::meet", mutates_args=())
    def meet(values: Tensor) -> Tensor:
        met.append(values.clone())
        return values.clone()

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Calls(meet), nn.Linear(4, 2))
    images = torch.ones(1, 4)
    expected = model[:2](images)
    cost(model, images)
    assert met
    for values in met:
        torch.testing.assert_close(values, expected)


class Calls(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: Tensor) -> Tensor:
        return self.function(values)
