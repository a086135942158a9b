"""What one replacement works on: the networks before and after, and who reads what goes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lit_prune.errors import InputError
from lit_prune.replace.carrier import with_carriers
from lit_prune.replace.consumers import Reader, find_readers
from lit_prune.replace.flow import Flow, observe
from lit_prune.replace.methods import Replacement, StandInMethod
from lit_prune.structure import ChannelGraph, Plan, apply_plan, trace_groups
from lit_prune.structure.example import Example
from lit_prune.structure.opened import open_copy
from lit_prune.task import Task


@dataclass(frozen=True)
class Job:
    """One replacement.

    Attributes:
        model: the original network.
        dense: the same without the plan's blocks.
        reduced: without the plan's channels too; changed in place.
        plan: what `reduced` keeps: the plan given, and the carriers.
        carriers: group -> removed unit that stays and carries the constants.
        graph: of `dense`.
        flow: of `dense`.
        readers: layers of `dense` in forward order, with what the plan given takes from them.
        refused: layer -> why nothing stands in for what it loses.
        task: what a batch and an output mean.
    """

    model: nn.Module
    dense: nn.Module
    reduced: nn.Module
    plan: Plan
    carriers: Mapping[str, int]
    graph: ChannelGraph
    flow: Flow
    readers: Mapping[str, Reader]
    refused: dict[str, str]
    task: Task

    @classmethod
    def prepare(
        cls, model: nn.Module, plan: Plan, example_input: Any, method: StandInMethod, settings: Replacement, task: Task
    ) -> "Job":
        """Surgery, and who reads what goes.

        Raises:
            InputError: as `replace_mechanisms`.
        """
        model = open_copy(model)  # its projections are layers of their own that can be read and solved again
        dense = apply_plan(model, Plan(plan.drop_blocks), example_input) if plan.drop_blocks else model
        graph, flow = trace_groups(dense, example_input), observe(dense, example_input)
        readers = find_readers(dense, plan, graph, flow)
        refused = {r.name: r.obstacle for r in readers.values() if r.removed and r.obstacle and method.changes}
        if refused and settings.unsupported == "refuse":
            name, reason = next(iter(refused.items()))
            groups = ", ".join(readers[name].groups)
            raise InputError(
                f"kind={method.name!r}: layer {name!r} reads units of group {groups} that the plan removes, "
                f"but {reason}; protect the group or set unsupported='delete'"
            )
        carriers: dict[str, int] = {}
        if settings.border == "carrier" and method.carries:
            plan, carriers = with_carriers(dense, plan, readers)
            wider = find_readers(dense, plan, graph, flow)
            readers = {name: replace(reader, written=wider[name].outputs) for name, reader in readers.items()}
            if plan.removes_nothing:
                raise InputError("border='carrier': the plan removes one unit a group, which its carrier would replace")
        reduced = apply_plan(model, plan, example_input)
        return cls(model, dense, reduced, plan, carriers, graph, flow, readers, refused, task)

    def losing(self) -> list[Reader]:
        """The layers that lose input channels and can be changed."""
        return [reader for reader in self.readers.values() if reader.removed and not reader.obstacle]


def example_of(task: Task, model: nn.Module, batch: Any) -> Example:
    """What the network is called with for a batch."""
    return task.inputs(task.to(batch, model))
