"""Groups of coupled channels as plain values: members, names, roles, and what removing units takes from each layer."""

import difflib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from torch import nn

from lit_prune.errors import InputError
from lit_prune.structure import axes, protection


@dataclass(frozen=True)
class Member:
    """One axis of one layer, or a bare parameter, that loses positions when the group loses units.

    Attributes:
        module: qualified name of the module (or of the parameter, such as a layer scale).
        axis: "out" (also for norms, depthwise convolutions, PReLU and bare parameters) or "in".
        positions: for each unit of the group its positions along the axis, the same number for every unit.
    """

    module: str
    axis: str
    positions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Group:
    """Channels that can only be removed together; their role in a network of blocks says which part they are.

    "heads" are whole heads of an attention, "head_width" the width of its heads: of queries and keys, which are cut in
    pairs, or of values, which a projection reads. Units of both lie in the same layers, so a plan takes either.

    "width" is every width that a LayerNorm or RMSNorm takes its statistics over, such as the embedding of a
    transformer or ConvNeXt: what is left is the same architecture built narrower, not the network with those channels
    silenced, so it goes only where it is asked for.

    "planes" is the trunk: channels that a residual add joins from several producers (the stem too where its output
    feeds the first add), channels that pass through a padded shortcut, a stem that both the first block and its
    projection shortcut read, and the projection that closes an inverted residual without a shortcut (it reads a
    depthwise convolution, its own channels have none). Everything else is "mid": the width inside a block, with one
    producer and perhaps a depthwise convolution or a gate that follows it. Plain networks (VGG, AlexNet) and
    DenseNets have only "mid" groups.

    Attributes:
        name: qualified name of the first producing convolution or linear layer, in module order.
        size: number of units.
        members: every axis that loses positions.
        protected: "" or the reason why no unit may be removed.
        producers: convolutions and linear layers (depthwise ones left out) that write the channels.
        consumers: convolutions and linear layers that read them.
        role: "planes", "mid", "heads", "head_width" or "width".
        kind: role and types of layers; groups of one kind are built alike and their scores compare.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    protected: str = ""
    producers: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    role: str = "mid"
    kind: str = ""

    @property
    def of_heads(self) -> bool:
        """Whether the units are heads of an attention, or parts of all of them."""
        return self.role in ("heads", "head_width")


@dataclass(frozen=True)
class Draft:
    """A proposed group, and whether an addition joins several producers."""

    group: Group
    joined: bool


def lost_positions(groups: Mapping[str, Group], removed: Mapping[str, Sequence[int]]) -> dict[axes.AxisKey, list[int]]:
    """Positions that each (module, axis) loses when the groups lose the given units, ascending.

    Raises:
        InputError: unknown or protected group, unit out of range, nothing removed, or nothing left of a group.
    """
    lost = positions_of((_checked(groups, name, units), units) for name, units in removed.items())
    if not lost:
        raise InputError(f"removed={dict(removed)} removes no channel; name at least one unit of one group")
    return lost


def positions_of(chosen: Iterable[tuple[Group, Sequence[int]]]) -> dict[axes.AxisKey, list[int]]:
    """Positions that units of groups have on each (module, axis), ascending."""
    found: dict[axes.AxisKey, set[int]] = {}
    for group, units in chosen:
        places: dict[int, set[int]] = {}  # of members that share their positions
        for member in group.members if units else ():
            if id(member.positions) not in places:
                of = member.positions
                places[id(of)] = {position for unit in set(units) for position in of[unit]}
            found.setdefault((member.module, member.axis), set()).update(places[id(member.positions)])
    return {key: sorted(positions) for key, positions in found.items()}


def common_scope(names: Iterable[str]) -> str:
    """The innermost module that is or holds each of these modules.

    >>> common_scope(["layer1.0.conv1", "layer1.0.conv2"])
    'layer1.0'
    """
    common = []
    for level in zip(*(name.split(".") if name else [] for name in names), strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def assemble_group(
    model: nn.Module, members: tuple[Member, ...], taken: set[str], heard: Set[str], order: Mapping[str, int]
) -> Group:
    """A group with its name, its producers and consumers, and the reason if its layers forbid pruning.

    Args:
        model: the network.
        members: its members.
        taken: names that other groups have.
        heard: reasons from the way of its channels through the network.
        order: name -> place of every module.
    """
    mixing = [m for m in members if m.module in order and axes.is_mixing(model.get_submodule(m.module))]
    producers = sorted({m.module for m in mixing if m.axis == "out"}, key=order.__getitem__)
    consumers = sorted({m.module for m in mixing if m.axis == "in"}, key=order.__getitem__)
    free = [name for name in producers if name not in taken]
    name = free[0] if free else f"{producers[0]}:{len(taken)}"
    reason = protection.structural_reason(model, members, heard)
    return Group(name, len(members[0].positions), members, reason, tuple(producers), tuple(consumers))


def assign_roles(model: nn.Module, groups: Sequence[Group], drafts: Sequence[Draft]) -> tuple[Group, ...]:
    """The groups with their roles."""
    joined = {name for draft in drafts if draft.joined for name in draft.group.producers}
    sure = [draft.joined or protection.is_trunk(model, draft.group, joined) for draft in drafts]
    read: dict[str, tuple[str, ...]] = {}  # layer -> producers of the depthwise width inside a block that it reads
    for group, trunk in zip(groups, sure, strict=True):
        if not trunk and protection.has_depthwise(model, group.members):
            read |= dict.fromkeys(group.consumers, group.producers)
    roles = [
        "width"
        if protection.has_layer_norm(model, group.members)
        else "planes"
        if trunk or protection.is_projection(model, group, read)
        else "mid"
        for group, trunk in zip(groups, sure, strict=True)
    ]
    return tuple(replace(group, role=role) for group, role in zip(groups, roles, strict=True))


def with_kind(model: nn.Module, group: Group) -> Group:
    """The group with its kind: its role, and which types of layers lose outputs and inputs.

    Source: isomorphic pruning (Fang et al. 2024), whose graphs of like topology these stand for.
    """
    parts = [(type(axes.find(model, m.module)).__name__, m.axis.partition(":")[0]) for m in group.members]
    layers = sorted({f"{layer} {axis}" for layer, axis in parts if axis in ("in", "out")})
    return replace(group, kind=f"{group.role}: {', '.join(layers)}")


def _checked(groups: Mapping[str, Group], name: str, units: Sequence[int]) -> Group:
    """The group, if the units can be removed from it."""
    if name not in groups:
        near = difflib.get_close_matches(name, groups, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the groups are {', '.join(list(groups)[:8])}"
        raise InputError(f"group {name!r} does not exist in this network: {hint}")
    group = groups[name]
    outside = [unit for unit in units if not 0 <= unit < group.size]
    if outside:
        raise InputError(f"group {name!r} has units 0 to {group.size - 1}, got {outside[0]}")
    if units and group.protected:
        raise InputError(f"group {name!r} is protected ({group.protected}): keep all its {group.size} units")
    if len(set(units)) == group.size:
        raise InputError(f"group {name!r} would lose all its {group.size} units: keep one at least")
    return group
