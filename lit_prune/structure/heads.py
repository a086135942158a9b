"""Groups of attention heads and of their widths: slices, the attributes that follow, a trial that both are right."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from torch import nn

from lit_prune.structure import axes
from lit_prune.structure.attention import find_attention
from lit_prune.structure.attention_parts import Attention
from lit_prune.structure.attention_slices import Slices
from lit_prune.structure.coupling import Group, Member
from lit_prune.structure.example import Example
from lit_prune.structure.heads_trial import ROLE, WIDTH, Trials, protected_attention
from lit_prune.structure.opened import opened

UNWRITTEN = "no layer writes a position of its values alone"
MIXED = "a norm or rotation mixes the positions of its queries and keys"


def head_groups(model: nn.Module, sample: Example) -> list[Group]:
    """Groups for each attention of `model`: one whose units are its heads, two whose units are positions within heads.

    The latter are `NAME.values` (with the projection that reads them) and `NAME.query_key` (the pairs that are
    multiplied); a unit is one position of every head. Protected, with the reason, where none can go. A group is offered
    only if it passes a trial: the attention without some units, run on what it reads in the pass, must give what the
    whole one gives with these units silenced, by the scale that it has.

    Args:
        model: network in evaluation mode whose parameters require gradients.
        sample: one sample.
    """
    with opened(model):
        found, calls = find_attention(model, sample)
        counts = {name: sum(other.name == name for other in found) for name in {a.name for a in found}}
        groups: list[Group] = []
        trials = Trials(model, calls)
        for attention in found:
            reason = attention.reason or ("its module attends several times" if counts[attention.name] > 1 else "")
            drafts = _drafts(model, attention, reason)
            groups += [draft if draft.protected else trials.tried(draft, attention) for draft in drafts]
        return groups


def _drafts(model: nn.Module, attention: Attention, reason: str) -> Iterator[Group]:
    """The groups of heads, of the values' width, of the queries' and keys', without the attributes that follow."""
    name, values, pairs = attention.name or "attention", attention.values, attention.pairs
    several, written = attention.heads > 1, bool(values.slices)
    projected = any(axes.find(model, part.name).dim() > 1 for part in pairs.slices)
    for group, size, found, columns, role, possible, why in (
        (name, attention.heads, attention.slices, attention.columns, ROLE, several, "it has one head"),
        (f"{name}.values", values.size, values.slices, values.columns, WIDTH, written, UNWRITTEN),
        (f"{name}.query_key", pairs.size, pairs.slices, (), WIDTH, projected, MIXED),
    ):
        if reason or not possible:
            yield protected_attention(group, size, reason or why, role)
        else:
            yield _draft(model, group, found, columns, attention, role)


def _draft(
    model: nn.Module, name: str, slices: Sequence[Slices], columns: tuple, attention: Attention, role: str
) -> Group:
    """A group of these slices and the reader's columns."""
    reader = attention.reader.rpartition(".")[0]
    members = [_member(model, part) for part in slices]
    layers = {m.module for m in members if isinstance(m, Member) and m.axis == "out"}
    members = [m for m in members if isinstance(m, str) or m.axis == "out" or m.module.rpartition(".")[0] not in layers]
    wrong = next((found for found in members if isinstance(found, str)), "")
    kept = tuple(dict.fromkeys(m for m in members if isinstance(m, Member)))
    kept += (Member(reader, "in", columns),) if columns else ()
    weighted = [m.module for m in kept if m.axis == "out" and axes.is_weighted(model.get_submodule(m.module))]
    if columns and not axes.is_weighted(axes.find(model, reader)):
        wrong = f"attention: {attention.reader} is no convolution or linear layer"
    units = len(slices[0].positions) if slices else 0
    return Group(name, units, kept, wrong, tuple(weighted), (reader,) if columns else (), role)


def _member(model: nn.Module, slices: Slices) -> Member | str:
    """The member that loses the slices: a layer as a whole where the parameter is the layer's, else the parameter."""
    owner, _, key = slices.name.rpartition(".")
    module = model.get_submodule(owner)
    if (axes.is_weighted(module) or axes.is_channelwise(module)) and key == "weight":
        if slices.dim == (1 if getattr(module, "transposed", False) else 0) and getattr(module, "groups", 1) in (
            1,
            axes.width(module, "out"),
        ):
            return Member(owner, "out", slices.positions)
        return f"attention: the heads lie along axis {slices.dim} of {slices.name}"
    return Member(slices.name, f"dim:{slices.dim}", slices.positions)


def axis_widths(model: nn.Module, groups: Sequence[Group]) -> dict[axes.AxisKey, int]:
    """(name, axis) -> its width, for the axes of `groups` that are no channels of layers."""
    members = (member for group in groups for member in group.members if ":" in member.axis)
    return {(m.module, m.axis): axes.width(axes.find(model, m.module), m.axis) for m in members}


def with_heads(groups: Sequence[Group], heads: Sequence[Group]) -> tuple[Group, ...]:
    """All groups; of those that are protected, the ones whose channels are heads' channels give way to them."""
    free = (group for group in heads if not group.protected and group.role == ROLE)
    claimed = _places(member for group in free for member in group.members)
    return (*(group for group in groups if not (group.protected and _gives_way(group, claimed))), *heads)


def _gives_way(group: Group, claimed: Mapping[axes.AxisKey, set[int]]) -> bool:
    """Whether all that the layers of a group write is claimed."""
    written = _places(m for m in group.members if m.module in group.producers and m.axis == "out")
    return bool(written) and all(places <= claimed.get(axis, set()) for axis, places in written.items())


def _places(members: Iterable[Member]) -> dict[axes.AxisKey, set[int]]:
    """The positions of each axis."""
    found: dict[axes.AxisKey, set[int]] = {}
    for member in members:
        found.setdefault((member.module, member.axis), set()).update(chain.from_iterable(member.positions))
    return found
