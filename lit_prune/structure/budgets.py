"""What a budget may count: each is a class, registered under its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import nn

from lit_prune.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from lit_prune.structure.cost import CostModel

Price = Callable[[np.ndarray], int]


class Quantity:
    """A cost of a network, of which a budget keeps a share.

    A subclass answers from arithmetic (`whole`), so that a budget is met without a forward pass, or sets
    `measured` and answers from the network alone (`of`); then the share is found by trial surgery.

    Attributes:
        name: under which it is registered.
        measured: whether it has to run the network.
    """

    name: ClassVar[str] = ""
    measured: ClassVar[bool] = False

    def of(self, model: nn.Module, example_input: Any) -> float:
        """The cost of a network."""
        raise InputError(f"budget={self.name!r} cannot be told from a network alone; use make_plan or plan_method")

    def whole(self, cost_model: CostModel, widths: np.ndarray) -> int:
        """The cost of the network whose groups have these widths."""
        raise InputError(f"budget={self.name!r} has to run the network; use make_plan or plan_method")

    def price(self, cost_model: CostModel, columns: np.ndarray) -> Price:
        """Widths of the groups in `columns` -> cost of the whole network, the other groups at their present width."""

        def price(widths: np.ndarray) -> int:
            everything = cost_model.sizes.copy()
            everything[columns] = widths
            return self.whole(cost_model, everything)

        return price


BUDGETS: dict[str, Quantity] = {}


def register_budget(name: str) -> Callable[[type[Quantity]], type[Quantity]]:
    """Class decorator: a budget may count this quantity, under this name."""

    def register(cls: type[Quantity]) -> type[Quantity]:
        cls.name = name
        BUDGETS[name] = cls()
        return cls

    return register


def find_budget(name: str) -> Quantity:
    """The quantity of a name.

    >>> find_budget("params").of(nn.Linear(3, 2), None)
    8

    Raises:
        InputError: unknown name.
    """
    if name not in BUDGETS:
        raise InputError(f"budget={name!r} is unknown: {did_you_mean(name, BUDGETS)}; use one of {', '.join(BUDGETS)}")
    return BUDGETS[name]


@register_budget("macs")
class Macs(Quantity):
    """Multiply-adds for one image, see `cost`."""

    def of(self, model: nn.Module, example_input: Any) -> float:
        """Counted."""
        from lit_prune.structure.cost import cost

        return cost(model, example_input).macs

    def whole(self, cost_model: CostModel, widths: np.ndarray) -> int:
        """By arithmetic."""
        return cost_model.macs(widths)


@register_budget("params")
class Params(Quantity):
    """Parameters."""

    def of(self, model: nn.Module, example_input: Any) -> float:
        """Counted."""
        return sum(parameter.numel() for parameter in model.parameters())

    def whole(self, cost_model: CostModel, widths: np.ndarray) -> int:
        """By arithmetic."""
        return cost_model.params(widths)


@register_budget("channels")
class Channels(Quantity):
    """Units of the groups that may be pruned; the others are not counted."""

    def price(self, cost_model: CostModel, columns: np.ndarray) -> Price:
        """The sum of the widths."""
        return lambda widths: int(widths.sum())


@register_budget("latency")
class Latency(Quantity):
    """Seconds of a forward pass of the example, measured."""

    measured = True

    def of(self, model: nn.Module, example_input: Any) -> float:
        """The median of some passes."""
        from lit_prune.structure.latency import measure_latency

        return measure_latency(model, tuple(example_input.shape[1:]), len(example_input))
