"""What a budget may count: each is a class, registered under its name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.registry import Kinds, Named
from lit_prune.structure.widths import Price

if TYPE_CHECKING:
    from lit_prune.structure.cost_model import CostModel
    from lit_prune.structure.groups import ChannelGraph
    from lit_prune.structure.runtimes import Runtime

STABLE = 0.2  # share by which times may differ before it is said


class Quantity(Named):
    """A cost of a network, of which a budget keeps a share.

    A subclass answers from arithmetic (`whole`), so that a budget is met without a forward pass, or sets `measured` and
    answers from the network alone (`of`); then widths are priced by what it grows with (`work`), and a few networks are
    cut and measured to find how (`plan_measured`).

    Attributes:
        measured: whether it has to run the network.
        unit: of its values, for messages.
        of_network: whether a network has such a cost, so that a stage keeps a share of the dense one's; else a stage
            keeps a share of what is there.
    """

    measured: ClassVar[bool] = False
    unit: ClassVar[str] = ""
    of_network: ClassVar[bool] = True

    def check(self, example_input: Any) -> None:
        """Refuses inputs that the quantity cannot be told with, before anything is trained."""

    def of(self, model: nn.Module, example_input: Any) -> float:
        """The cost of a network; here by the arithmetic of its groups at their present width."""
        from lit_prune.structure.cost_model import CostModel
        from lit_prune.structure.groups import trace_groups

        cost_model = CostModel.build(model, trace_groups(model, example_input), example_input)
        return self.whole(cost_model, cost_model.sizes)

    def compare(self, models: Sequence[nn.Module], example_input: Any) -> list[float]:
        """The costs of networks that are measured together."""
        return [self.of(model, example_input) for model in models]

    def whole(self, cost_model: CostModel, widths: np.ndarray) -> float:
        """The cost of the network whose groups have these widths; what is measured has one in `plan_measured` alone."""
        if cost_model.measured is None:
            raise InputError(f"budget={self.name!r} is not counted by arithmetic; use make_plan or plan_method")
        return cost_model.measured(widths)

    def work(self, model: nn.Module, graph: ChannelGraph, cost_model: CostModel, example_input: Any) -> Price:
        """What a measured cost grows with, of the widths of all groups and in any unit: here the multiply-adds."""
        return cost_model.macs

    def price(self, cost_model: CostModel, columns: np.ndarray) -> Price:
        """Widths of the groups in `columns` -> cost of the whole network, the other groups at their present width."""

        def price(widths: np.ndarray) -> float:
            everything = cost_model.sizes.copy()
            everything[columns] = widths
            return self.whole(cost_model, everything)

        return price


BUDGETS = Kinds("budget", Quantity)


def register_budget(name: str) -> Callable[[type[Quantity]], type[Quantity]]:
    """Class decorator: a budget may count this quantity, under this name."""
    return BUDGETS.register(name)


def find_budget(name: str) -> Quantity:
    """The quantity of a name, or of the class that `package.module:Class` names.

    >>> find_budget("params").of(nn.Linear(3, 2), None)
    8

    Raises:
        InputError: unknown name, or no `Quantity`.
    """
    return BUDGETS.make(name)


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

    of_network = False

    def price(self, cost_model: CostModel, columns: np.ndarray) -> Price:
        """The sum of the widths."""
        return lambda widths: int(widths.sum())


@register_budget("latency")
class Latency(Quantity):
    """Seconds of a forward pass of the example in PyTorch, on the network's device.

    Attributes:
        batch: samples in a pass; None: as many as the example has (`compress` and stages give one).
    """

    measured = True
    unit = "s"
    batch: ClassVar[int | None] = None

    @cached_property
    def runtime(self) -> Runtime:
        """What runs the network."""
        from lit_prune.structure.runtimes import Eager

        return Eager()

    def check(self, example_input: Any) -> None:
        """One tensor, since a batch of it is made, and what runs it is installed."""
        if not isinstance(example_input, Tensor):
            raise InputError(f"budget={self.name}: the network reads more than one tensor; use macs or params")
        if absent := self.runtime.missing():
            raise InputError(f"budget={self.name}: {', '.join(absent)} missing; pip install 'lit-prune[export]'")

    def of(self, model: nn.Module, example_input: Any) -> float:
        """The quickest of some passes."""
        return self.compare([model], example_input)[0]

    def compare(self, models: Sequence[nn.Module], example_input: Any) -> list[float]:
        """The quickest of passes in turns."""
        from lit_prune.structure.latency import best_latencies

        return best_latencies(models, self._images(models[0], example_input), self.runtime)

    def work(self, model: nn.Module, graph: ChannelGraph, cost_model: CostModel, example_input: Any) -> Price:
        """Seconds of the layers by a table of their shapes, see `time_layers`."""
        from lit_prune.structure.latency_table import time_layers

        table = time_layers(model, graph, self._images(model, example_input), self.runtime)
        if table is not None and table.spread > STABLE:
            warnings.warn(
                f"{self.name}: single layers took up to {table.spread:.0%} longer in one half of the passes than in "
                "the other; the plan is no better than that: repeat it on an idle device, or give budget='macs'",
                stacklevel=2,
            )
        return table or cost_model.macs

    def _images(self, model: nn.Module, example_input: Any) -> Tensor:
        self.check(example_input)
        like = next((p for p in model.parameters() if p.is_floating_point()), example_input)
        return like.new_zeros(self.batch or len(example_input), *example_input.shape[1:])


@register_budget("latency_64")
class Latency64(Latency):
    """Seconds of a pass of 64 samples in PyTorch, on the network's device."""

    batch = 64


@register_budget("latency_onnx")
class OnnxLatency(Latency):
    """Seconds of a pass of one sample in ONNX Runtime, on the CPU with torch's threads."""

    batch = 1

    @cached_property
    def runtime(self) -> Runtime:
        """What runs the network."""
        from lit_prune.structure.runtimes import OnnxRuntime

        return OnnxRuntime()


@register_budget("latency_onnx_64")
class OnnxLatency64(OnnxLatency):
    """Seconds of a pass of 64 samples in ONNX Runtime, on the CPU with torch's threads."""

    batch = 64
