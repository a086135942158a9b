"""Groups of attention heads: the slices of each head, the attributes that follow, and a trial that both are right."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lit_prune.structure import axes
from lit_prune.structure.attention import MIXERS, Attention, Slices, find_attention
from lit_prune.structure.coupling import Group, Member
from lit_prune.structure.cutting import cut_layer
from lit_prune.structure.example import Example
from lit_prune.structure.opened import opened
from lit_prune.structure.tracing import sketch_network

ROLE = "heads"
_CLOSE = 1e-4  # of the largest value: rounding of products that are summed over fewer heads
_Call = tuple[tuple, dict]


def head_groups(model: nn.Module, sample: Example) -> list[Group]:
    """A group for each attention of `model` whose units are its heads; protected, with the reason, where none can go.

    A group is offered only if it passes a trial: the attention without some heads, run on what it reads in the pass,
    must give what the whole one gives with these heads silenced.

    Args:
        model: network in evaluation mode whose parameters require gradients.
        sample: one sample.
    """
    with opened(model):
        found, calls = find_attention(model, sample)
        counts = {name: sum(other.name == name for other in found) for name in {a.name for a in found}}
        drafts = [_draft(model, attention, counts[attention.name]) for attention in found]
        pairs = zip(drafts, found, strict=True)
        scopes = {group.name: _scope(attention.name, group) for group, attention in pairs if not group.protected}
        return [
            group if group.protected else _tried(model, group, attention, scopes[group.name], calls)
            for group, attention in zip(drafts, found, strict=True)
        ]


def _draft(model: nn.Module, attention: Attention, count: int) -> Group:
    """The group without the attributes that follow."""
    name = attention.name or "attention"
    if count > 1 or attention.reason or attention.heads < 2:
        reason = attention.reason or ("it has one head" if attention.heads < 2 else "its module attends several times")
        return Group(name, attention.heads, (), f"attention: {reason}", role=ROLE)
    reader = attention.reader.rpartition(".")[0]
    members = [_member(model, slices) for slices in attention.slices]
    layers = {m.module for m in members if isinstance(m, Member) and m.axis == "out"}
    members = [m for m in members if isinstance(m, str) or m.axis == "out" or m.module.rpartition(".")[0] not in layers]
    wrong = next((found for found in members if isinstance(found, str)), "")
    kept = tuple(dict.fromkeys(m for m in members if isinstance(m, Member)))
    kept += (Member(reader, "in", attention.columns),)
    weighted = [m.module for m in kept if m.axis == "out" and axes.is_weighted(model.get_submodule(m.module))]
    if not axes.is_weighted(axes.find(model, reader)):
        wrong = f"attention: {attention.reader} is no convolution or linear layer"
    return Group(name, attention.heads, kept, wrong, tuple(weighted), (reader,), ROLE)


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


def _scope(name: str, group: Group) -> str:
    """The smallest module that holds the attention and all its members."""
    names = [name, *(m.module if m.axis in ("in", "out") else m.module.rpartition(".")[0] for m in group.members)]
    parts = [name.split(".") if name else [] for name in names]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _tried(model: nn.Module, group: Group, attention: Attention, scope: str, calls: Mapping[str, _Call]) -> Group:
    """The group with the attributes that must follow, or protected if no choice of them passes the trial."""
    if scope not in calls:
        return Group(group.name, group.size, (), "attention: no module runs that holds all of it", role=ROLE)
    removed = list(range(1, group.size, 2))
    whole = model.get_submodule(scope)
    with torch.no_grad(), _silenced(model, attention, removed):
        expected = _output(whole, calls[scope])
    reason = "no attribute that states the number of heads was found"
    for attributes in _choices(model, group, attention, scope):
        members = (*attributes, *group.members)
        try:
            with torch.no_grad():
                actual = _output(_without(whole, scope, members, removed), calls[scope])
        except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
            reason = f"its forward does not run without a head ({str(error).splitlines()[0][:80]})"
            continue
        if _alike(actual, expected):
            return Group(group.name, group.size, members, "", group.producers, group.consumers, ROLE)
        reason = "without a head its output is not that with the head silenced"
    return Group(group.name, group.size, (), f"attention: {reason}", role=ROLE)


def _choices(model: nn.Module, group: Group, attention: Attention, scope: str) -> Iterator[tuple[Member, ...]]:
    """Attributes that may have to follow: numbers of heads, with and without widths of all heads."""
    holders = _between(scope, attention.name)
    widths = {len(m.positions[0]) * group.size for m in group.members if len(m.positions[0]) > 1}
    heads, sizes = [], []
    for holder in holders:
        for key, value in vars(model.get_submodule(holder)).items():
            if type(value) is int and value == group.size and "head" in key:
                heads.append(Member(holder, f"heads:{key}", tuple((head,) for head in range(group.size))))
            elif type(value) is int and value in widths:
                each = value // group.size
                rows = tuple(tuple(range(head * each, head * each + each)) for head in range(group.size))
                sizes.append(Member(holder, f"attribute:{key}", rows))
    if heads:
        yield tuple(heads)
        if sizes:
            yield (*heads, *sizes)


def _between(scope: str, name: str) -> list[str]:
    """`name` and the modules around it up to `scope`, innermost first."""
    found = [name]
    while found[-1] != scope:
        found.append(found[-1].rpartition(".")[0])
    return found


def _without(whole: nn.Module, scope: str, members: Sequence[Member], removed: list[int]) -> nn.Module:
    """A copy of the module `scope` without the heads `removed`."""
    holder = nn.Module()
    holder.scope = sketch_network(whole)
    for member in members:
        inner = f"scope.{member.module[len(scope) :].lstrip('.')}".rstrip(".")
        cut_layer(holder, inner, member.axis, [place for unit in removed for place in member.positions[unit]])
    return holder.scope


@contextmanager
def _silenced(model: nn.Module, attention: Attention, removed: list[int]) -> Iterator[None]:
    """The layer that reads the heads sees zeros in the place of those `removed`."""
    lost = [column for head in removed for column in attention.columns[head]]
    weight = axes.find(model, attention.reader)

    class Silence(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if function in MIXERS and (args[1] if len(args) > 1 else kwargs["weight"]) is weight:
                dim = args[0].dim() - 1 if function.__name__ == "linear" else 1
                index = torch.tensor(lost, device=args[0].device)
                args = (args[0].index_fill(dim, index, 0.0), *args[1:])
            return function(*args, **kwargs)

    with Silence():
        yield


def _output(module: nn.Module, call: _Call) -> list[Tensor]:
    args, kwargs = tree_map(lambda value: value.detach().clone() if isinstance(value, Tensor) else value, call)
    return [leaf for leaf in tree_leaves(module(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _alike(actual: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether the first outputs agree; further ones (weights of each head) may have lost heads."""
    if not actual or actual[0].shape != expected[0].shape:
        return False
    difference = (actual[0] - expected[0]).abs().max()
    return bool(difference <= _CLOSE * expected[0].abs().max())


def axis_widths(model: nn.Module, groups: Sequence[Group]) -> dict[axes.Axis, int]:
    """(name, axis) -> its width, for the axes of `groups` that are no channels of layers."""
    members = (member for group in groups for member in group.members if ":" in member.axis)
    return {(m.module, m.axis): axes.width(axes.find(model, m.module), m.axis) for m in members}


def with_heads(groups: Sequence[Group], heads: Sequence[Group]) -> tuple[Group, ...]:
    """All groups; of those that are protected, the ones whose channels are heads' channels give way to them."""
    claimed = {
        (m.module, m.axis, place)
        for group in heads
        if not group.protected
        for m in group.members
        for unit in m.positions
        for place in unit
    }
    rest = [group for group in groups if not (group.protected and _written(group) and _written(group) <= claimed)]
    return (*rest, *heads)


def _written(group: Group) -> set[tuple[str, str, int]]:
    """Positions that the layers of a group write."""
    members = (member for member in group.members if member.module in group.producers and member.axis == "out")
    return {(m.module, m.axis, place) for m in members for unit in m.positions for place in unit}
