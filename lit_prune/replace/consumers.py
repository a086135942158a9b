"""Who reads the channels that a plan removes, and whether something can stand in for them there."""

from dataclasses import dataclass

from torch import nn

from lit_prune.replace.flow import Flow
from lit_prune.replace.kernels import is_solvable
from lit_prune.structure import ChannelGraph, Plan, axes


@dataclass(frozen=True)
class Reader:
    """A layer that runs, with what the plan does to it.

    Attributes:
        name: qualified name.
        removed: input channels (columns) that go, ascending.
        kept: input channels that stay.
        outputs: output channels that stay.
        written: output channels of the layer afterwards: `outputs`, and carriers of constants where there are some.
        groups: names of the groups whose units it loses.
        obstacle: "" or why its columns cannot be replaced.
        calls: how often it runs in a forward pass.
    """

    name: str
    removed: tuple[int, ...]
    kept: tuple[int, ...]
    outputs: tuple[int, ...]
    written: tuple[int, ...]
    groups: tuple[str, ...]
    obstacle: str
    calls: int = 1


def find_readers(model: nn.Module, plan: Plan, graph: ChannelGraph, flow: Flow) -> dict[str, Reader]:
    """The layers that run, in forward order, with the input columns and output channels that the plan takes from them.

    Args:
        model: the network before the plan's channels go, without the plan's blocks.
        plan: what to keep.
        graph: of `model`.
        flow: of `model`.
    """
    lost = graph.lost(plan)
    groups: dict[str, list[str]] = {}
    for name in plan.removals:
        for member in graph.by_name[name].members:
            if member.axis == "in":
                groups.setdefault(member.module, []).append(name)
    readers = {}
    for name in dict.fromkeys(flow.layers):
        module = model.get_submodule(name)
        kept = {side: _rest(axes.width(module, side), lost.get((name, side), [])) for side in ("in", "out")}
        obstacle = _obstacle(module)
        columns = tuple(lost.get((name, "in"), ()))
        readers[name] = Reader(
            name,
            columns,
            kept["in"],
            kept["out"],
            kept["out"],
            tuple(groups.get(name, ())),
            obstacle,
            flow.layers.count(name),
        )
    return readers


def _rest(width: int, removed: list[int]) -> tuple[int, ...]:
    return tuple(sorted(set(range(width)) - set(removed)))


def _obstacle(module: nn.Module) -> str:
    """Why the input columns of `module` can neither be folded nor solved again, or ""."""
    if not axes.is_weighted(module):
        return f"it is a {type(module).__name__}, which has no weights that are known to be those of an affine map"
    if getattr(module, "groups", 1) > 1:
        return "its convolution is grouped"
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return "its weights are reparametrised"
    if not is_solvable(module):
        return f"the forward of {type(module).__name__} is another map than that of the weights that it holds"
    return ""
