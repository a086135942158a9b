"""Groups of coupled channels: what goes together according to one pass through the network, see `following`."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_prune.structure import axes, protection, reasons
from lit_prune.structure.coupling import Draft, Member, assemble_group
from lit_prune.structure.example import Example
from lit_prune.structure.following import Follower
from lit_prune.structure.labels import Labels

_Unit = dict[axes.AxisKey, list[int]]
_STATED = ("hidden_dim", "embed_dim", "num_features", "head_hidden_size")
"""Attributes in which a network states the width of its embedding."""


def propose_groups(model: nn.Module, sample: Example) -> list[Draft]:
    """Groups of units that lose the same numbers of positions of the same axes, in module order.

    Args:
        model: network in evaluation mode, without hooks.
        sample: what it is called with.
    """
    follower = Follower(model)
    output = follower.run(model, sample)
    labels = follower.labels
    labels.keep([found for t in _results(output) if (found := follower.of(t)) is not None], reasons.OUTPUT)
    _tie_shared(model, labels)
    return _with_attributes(model, list(_drafts(model, labels)))


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


def _results(output: Any) -> list[Tensor]:
    """Tensors of an output, also those that an object of the network's own holds."""
    held = list(vars(output).values()) if hasattr(output, "__dict__") and not isinstance(output, Tensor) else output
    return [leaf for leaf in tree_leaves([output, held]) if isinstance(leaf, Tensor)]


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
    units = _units(labels, component)
    reasons: dict[int, set[str]] = {}
    for label, reason in labels.reasons.items():
        reasons.setdefault(int(component[label]), set()).add(reason)
    joined = set(np.concatenate([component[found] for found in labels.joined]).tolist()) if labels.joined else set()
    kinds: dict[tuple, list[int]] = {}
    for number in _in_order(model, labels, component):
        unit = units[number]
        counts = tuple((axis, len(positions)) for axis, positions in unit.items())
        kinds.setdefault((counts, frozenset(reasons.get(number, ()))), []).append(number)
    names: set[str] = set()
    for (counts, why), numbers in kinds.items():
        members = tuple(
            _member(model, name, axis, [units[number][name, axis] for number in numbers]) for (name, axis), _ in counts
        )
        group = assemble_group(model, members, names, why)
        names.add(group.name)
        yield Draft(group, bool(joined.intersection(numbers)))


def _member(model: nn.Module, name: str, axis: str, positions: list[list[int]]) -> Member:
    """The member of a group; slices of a bare tensor with several axes lie along the one that is the channels."""
    tensor = axes.find(model, name)
    if isinstance(tensor, Tensor) and sum(size > 1 for size in tensor.shape) > 1:
        for dim, size in enumerate(tensor.shape):
            where = np.unravel_index(np.array(positions), tensor.shape)[dim]  # [units, values of one]
            if where.shape[1] * size == tensor.numel() and (where == where[:, :1]).all():
                return Member(name, f"dim:{dim}", tuple((int(place),) for place in where[:, 0]))
    return Member(name, axis, tuple(map(tuple, positions)))


def _units(labels: Labels, component: np.ndarray) -> Mapping[int, _Unit]:
    """Component -> the positions of each axis that belong to it."""
    units: dict[int, _Unit] = {}
    for (name, axis), first in labels.axes.items():
        if name:
            for position, number in enumerate(component[first : first + labels.widths[name, axis]].tolist()):
                units.setdefault(number, {}).setdefault((name, axis), []).append(position)
    return units


def _in_order(model: nn.Module, labels: Labels, component: np.ndarray) -> list[int]:
    """Components that a layer writes, each once, in module order."""
    found: dict[int, None] = {}
    for name, module in model.named_modules():
        if axes.is_mixing(module) and (name, "out") in labels.axes:
            first = labels.axes[name, "out"]
            found |= dict.fromkeys(component[first : first + labels.widths[name, "out"]].tolist())
    return list(found)
