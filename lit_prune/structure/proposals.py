"""Groups of coupled channels: what goes together according to one pass through the network, see `following`."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.structure import axes, protection, reasons
from lit_prune.structure.coupling import Draft, Member, assemble_group
from lit_prune.structure.example import Example, pair_of
from lit_prune.structure.following import Follower
from lit_prune.structure.hollow import for_shapes
from lit_prune.structure.labels import Labels
from lit_prune.structure.tracing import answered, sketch_network

_STATED = ("hidden_dim", "embed_dim", "num_features", "head_hidden_size")
"""Attributes in which a network states the width of its embedding."""
_NO_REASON: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Proposal:
    """What two passes, one of them in training mode where layers did not run in the first, say of a network.

    Attributes:
        drafts: groups of units that lose the same numbers of positions of the same axes, in module order.
        attends: whether there may be attention in the network.
        asides: layers that run in training alone, such as those of auxiliary heads.
    """

    drafts: list[Draft]
    attends: bool
    asides: frozenset[str]


def propose_groups(model: nn.Module, sample: Example) -> Proposal:
    """The groups as one pass shows them, of a network in evaluation mode without hooks.

    Raises:
        InputError: which layers run depends on values of the input.
    """
    follower = for_shapes(partial(_followed, model, sample, None), model)
    if follower.decides:
        _check_decisions(model, sample, follower.ran)
    labels, asides = follower.labels, frozenset[str]()
    if silent := follower.layers - follower.ran:
        with suppress(Exception):  # whatever a network raises that asks for targets in training
            aside = for_shapes(partial(_followed, sketch_network(model).train(), pair_of(sample), labels))
            asides = frozenset(silent & aside.ran)
            labels = aside.labels if asides else labels
    _tie_shared(model, labels)
    return Proposal(_with_attributes(model, list(_drafts(model, labels))), follower.attends, asides)


def _followed(model: nn.Module, sample: Example, known: Labels | None, hollow: bool) -> Follower:
    """What a follower saw beside what is known, with the outputs kept."""
    follower = Follower(model, sample, hollow)
    follower.labels = follower.labels if known is None else copy.deepcopy(known)
    output = follower.run()
    follower.labels.keep([found for t in answered(output) if (found := follower.of(t)) is not None], reasons.OUTPUT)
    return follower


def _check_decisions(model: nn.Module, sample: Example, ran: set[str]) -> None:
    """Runs the network once more with every decision upon values of the input turned round: the same layers must run.

    A decision that only raises an error is none between ways.
    """
    other = Follower(model, sample, inverts=True)
    try:
        other.run()
    except Exception:  # whatever a network raises that finds its input wrong
        return
    if other.ran != ran:
        name = min(other.ran ^ ran)
        raise InputError(
            f"model: whether layer {name!r} runs depends on values of the input, so no plan would be right for all "
            "inputs; compute both ways and choose with torch.where, or give the part of the network that always runs"
        )


def _with_attributes(model: nn.Module, drafts: list[Draft]) -> list[Draft]:
    """The drafts; the width that norms read takes the attributes of the network along that state it."""
    wide = [draft.group.size for draft in drafts if protection.has_layer_norm(model, draft.group.members)]
    found = []
    for draft in drafts:
        group = draft.group
        keys = [key for key in _STATED if getattr(model, key, None) == group.size]
        if wide.count(group.size) == 1 and protection.has_layer_norm(model, group.members):
            units = tuple((unit,) for unit in range(group.size))
            group = replace(group, members=group.members + tuple(Member("", f"attribute:{key}", units) for key in keys))
        found.append(Draft(group, draft.joined))
    return found


def _tie_shared(model: nn.Module, labels: Labels) -> None:
    """Layers that hold one weight lose the same positions; channels of one that is no such layer stay."""
    for holders in protection.shared_parameters(model):
        layers = [model.get_submodule(name) for name, _ in holders]
        plain = all(axes.is_weighted(m) and getattr(m, "groups", 1) == 1 for m in layers)
        weight = all(key == "weight" for _, key in holders)
        for axis in ("out", "in") if weight else ("out",):
            found = [
                labels.axis(name, axis, axes.width(layer, axis))
                for (name, _), layer in zip(holders, layers, strict=True)
                if axes.is_weighted(layer) or (axis == "out" and axes.is_channelwise(layer))
            ]
            if plain and len({len(positions) for positions in found}) == 1:
                for positions in found[1:]:
                    labels.tie(found[0], positions)
            else:
                labels.keep(found, reasons.SHARED)


def _drafts(model: nn.Module, labels: Labels) -> Iterator[Draft]:
    """Units in the order of the first layer that writes them, those alike in one group."""
    component = labels.components()
    units = _Units(labels, component)
    reasons: dict[int, set[str]] = {}
    for label, reason in labels.reasons.items():
        reasons.setdefault(int(component[label]), set()).add(reason)
    joined = set(np.concatenate([component[found] for found in labels.joined]).tolist()) if labels.joined else set()
    kinds: dict[tuple, list[int]] = {}
    for number in _in_order(model, labels, component):
        why = frozenset(reasons[number]) if number in reasons else _NO_REASON
        kinds.setdefault((units.form(number), why), []).append(number)
    names: set[str] = set()
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    for (_, why), numbers in kinds.items():
        same: dict[bytes, tuple[tuple[int, ...], ...]] = {}  # most members of a group have the same positions
        members = tuple(_member(model, *axis, positions, same) for axis, positions in units.positions(numbers))
        group = assemble_group(model, members, names, why, order)
        names.add(group.name)
        yield Draft(group, bool(joined.intersection(numbers)))


def _member(
    model: nn.Module, name: str, axis: str, positions: np.ndarray, same: dict[bytes, tuple[tuple[int, ...], ...]]
) -> Member:
    """The member of a group; slices of a bare tensor with several axes lie along the one that is the channels.

    Args:
        model: the network.
        name: layer or tensor.
        axis: its axis.
        positions: int64 [units, positions of one].
        same: bytes of positions -> the positions, of members so far; all of one number of units.
    """
    tensor = axes.find(model, name)
    if isinstance(tensor, Tensor) and sum(size > 1 for size in tensor.shape) > 1:
        for dim, size in enumerate(tensor.shape):
            where = np.unravel_index(positions, tensor.shape)[dim]  # [units, values of one]
            if where.shape[1] * size == tensor.numel() and (where == where[:, :1]).all():
                return Member(name, f"dim:{dim}", tuple((int(place),) for place in where[:, 0]))
    key = positions.tobytes()
    if key not in same:
        same[key] = tuple(map(tuple, positions.tolist()))
    return Member(name, axis, same[key])


class _Units:
    """The positions of each axis that belong to a component: all in one table, sorted by component, then axis."""

    def __init__(self, labels: Labels, component: np.ndarray) -> None:
        self._axes = [axis for axis in labels.axes if axis[0]]
        firsts, widths = (np.array([of[a] for a in self._axes], dtype=np.int64) for of in (labels.axes, labels.widths))
        places = np.concatenate([np.arange(0), *map(np.arange, widths)])
        owners = component[places + np.repeat(firsts, widths)]
        order = np.argsort(owners, kind="stable")
        self._places, self._axis = places[order], np.repeat(np.arange(len(widths)), widths)[order]
        self._begin = np.searchsorted(owners[order], np.arange(component.max() + 2))
        self._forms, self._ends = self._axis.tobytes(), (self._axis.itemsize * self._begin).tolist()

    def form(self, number: int) -> bytes:
        """The same for components with equally many positions of the same axes."""
        return self._forms[self._ends[number] : self._ends[number + 1]]

    def positions(self, numbers: Sequence[int]) -> Iterator[tuple[axes.AxisKey, np.ndarray]]:
        """Axis by axis, int64 [components, positions of one], for components of one form."""
        of = self._axis[slice(*self._begin[[numbers[0], numbers[0] + 1]])]
        table = self._places[self._begin[np.array(numbers)][:, None] + np.arange(len(of))]
        for axis in dict.fromkeys(of.tolist()):
            yield self._axes[axis], table[:, of == axis]


def _in_order(model: nn.Module, labels: Labels, component: np.ndarray) -> list[int]:
    """Components that a layer writes, each once, in module order."""
    found: dict[int, None] = {}
    for name, module in model.named_modules():
        if axes.is_mixing(module) and (name, "out") in labels.axes:
            first = labels.axes[name, "out"]
            found |= dict.fromkeys(component[first : first + labels.widths[name, "out"]].tolist())
    return list(found)
