"""One channel that is constant everywhere and so carries the constants of the removed ones through zero padding."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.layers import removing
from lit_prune.replace.flow import Flow, Reader
from lit_prune.replace.own_forward import has_own_forward
from lit_prune.running import undisturbed
from lit_prune.structure import ChannelGraph, Group, Plan
from lit_prune.structure.example import Example

FLATNESS = 1e-5  # largest deviation of a carrier from its mean, over the mean


def pads_with_zeros(module: nn.Module) -> bool:
    """Whether a convolution reads zeros beyond the border of its input."""
    return (
        isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and module.padding_mode == "zeros"
        and not has_own_forward(module)
        and any(module._reversed_padding_repeated_twice)
    )


def with_carriers(model: nn.Module, plan: Plan, readers: Mapping[str, Reader]) -> tuple[Plan, dict[str, int]]:
    """The plan with one removed unit kept in each group that zero-padded convolutions read, and those by group."""
    padded = [
        r for r in readers.values() if r.removed and not r.obstacle and pads_with_zeros(model.get_submodule(r.name))
    ]
    carriers = {group: plan.removed(group)[0] for reader in padded for group in reader.groups}
    keep = dict(plan.keep_channels)
    for group, unit in carriers.items():
        keep[group] = tuple(sorted((*keep[group], unit)))
    return replace(plan, keep_channels=keep), carriers


def light_carriers(
    reduced: nn.Module, graph: ChannelGraph, plan: Plan, carriers: Mapping[str, int], flow: Flow
) -> list[str]:
    """Makes the carriers independent of the image: no incoming weights, norm (or bias) set to 1.

    Of several producers that an addition joins, the first sends 1 and the others 0.

    Args:
        reduced: the network after `plan`, changed in place.
        graph: of the network before the channels go.
        plan: the plan with carriers.
        carriers: group -> unit.
        flow: of the network before.

    Returns:
        Producers that gained a bias.
    """
    lost = graph.lost(plan)
    gained = []
    for name, unit in carriers.items():
        for rank, producer in enumerate(graph.by_name[name].producers):
            rows = [_after(row, lost.get((producer, "out"), [])) for row in _rows(graph.by_name[name], producer, unit)]
            if _send(reduced, producer, flow.norms.get(producer, ""), rows, float(rank == 0)):
                gained.append(producer)
    return gained


def carrier_columns(graph: ChannelGraph, carriers: Mapping[str, int], reader: Reader) -> list[int]:
    """Input columns of `reader`, as in the network before, that belong to carriers."""
    columns: list[int] = []
    for name in reader.groups:
        for member in graph.by_name[name].members if name in carriers else ():
            if member.module == reader.name and member.axis == "in":
                columns += member.positions[carriers[name]]
    return sorted(columns)


def carried_value(reduced: nn.Module, layer: str, column: int, example: Example) -> float:
    """The value that a carrier has where `layer` reads it. InputError: it is zero, or not the same everywhere."""
    seen: list[Tensor] = []
    hook = reduced.get_submodule(layer).register_forward_pre_hook(lambda module, args: seen.append(args[0][:, column]))
    with removing([hook]), undisturbed(reduced):
        reduced(*example.args, **example.kwargs)
    value = float(seen[0].double().mean())
    if value == 0 or float((seen[0] - value).abs().max()) > FLATNESS * abs(value):
        raise InputError(
            f"border='carrier': what layer {layer!r} reads of a constant channel is not a constant other than zero "
            "(padding or a gate lies between); use border='bias'"
        )
    return value


def _rows(group: Group, producer: str, unit: int) -> tuple[int, ...]:
    members = (member for member in group.members if (member.module, member.axis) == (producer, "out"))
    return next(members).positions[unit]


def _after(position: int, lost: list[int]) -> int:
    """Where a position is when those of `lost` are gone."""
    return position - sum(other < position for other in lost)


def _send(model: nn.Module, producer: str, norm: str, rows: list[int], value: float) -> bool:
    """Sets the output channels `rows` to `value`, whatever the input; whether the producer gained a bias."""
    module = model.get_submodule(producer)
    with torch.no_grad():
        module.weight[rows] = 0
        target = model.get_submodule(norm) if norm and model.get_submodule(norm).affine else module
        gained = target.bias is None and value != 0
        if gained:
            target.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)), module.weight.requires_grad)
        if target is not module:
            target.weight[rows] = 0
        if target.bias is not None:
            target.bias[rows] = value
    return gained
