"""Groups of coupled channels: which positions of which layers go together when one channel goes.

One pass through the network proposes the groups (`proposals`), and every proposal is checked: a group is kept for
pruning only if marks put on its channels arrive where it says (`probe`) and a copy without half of it (`cutting`)
computes the right thing (`trial`). The others are listed too, with the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from torch import nn

from lit_prune.structure import axes, probe, protection, trial
from lit_prune.structure.coupling import Group, Member, assign_roles, lost_positions, with_kind
from lit_prune.structure.cutting import cut_layer
from lit_prune.structure.example import Example
from lit_prune.structure.heads import axis_widths, head_groups, with_heads
from lit_prune.structure.known import once
from lit_prune.structure.opened import open_layer, opened
from lit_prune.structure.plan import Plan
from lit_prune.structure.proposals import propose_groups
from lit_prune.structure.tracing import one_sample, run, traceable
from lit_prune.tensor_files import check_defined

__all__ = ["ChannelGraph", "Group", "Member", "trace_groups"]


@dataclass(frozen=True)
class ChannelGraph:
    """All groups of a network, in module order.

    Attributes:
        groups: the groups, prunable or protected.
        widths: (module, axis) -> number of channels when traced, for every axis that belongs to a group.
    """

    groups: tuple[Group, ...]
    widths: Mapping[axes.AxisKey, int] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> dict[str, Group]:
        """Name -> group."""
        return {group.name: group for group in self.groups}

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups that are not protected."""
        return tuple(group for group in self.groups if not group.protected)

    def removed_positions(self, removed: Mapping[str, Sequence[int]]) -> dict[axes.AxisKey, list[int]]:
        """Positions that each (module, axis) loses when the groups lose the given units.

        Raises:
            InputError: unknown or protected group, unit out of range, nothing removed, or nothing left of a group.
        """
        return lost_positions(self.by_name, removed)

    def lost(self, plan: Plan) -> dict[axes.AxisKey, list[int]]:
        """Positions that each (module, axis) loses under a plan; none where it removes nothing.

        Raises:
            InputError: the plan names what cannot go, see `removed_positions`.
        """
        return self.removed_positions(plan.removals) if plan.removals else {}

    def remove(self, model: nn.Module, removed: Mapping[str, Sequence[int]]) -> None:
        """Removes units of groups from `model` in place: weights, gradients, statistics, attributes that state a width.

        The network must be the traced one or a copy. `requires_grad` flags, training flags, device, precision and
        memory format stay. Optimizers that hold the old parameters do not follow.

        Raises:
            InputError: as in `removed_positions`.
            RuntimeError: a layer has not the expected width afterwards; it is named.
        """
        shared = protection.shared_parameters(model)
        for (name, axis), positions in self.removed_positions(removed).items():
            if axes.stated(axis):
                open_layer(model.get_submodule(name))  # which states widths of heads only then
            before = axes.width(axes.find(model, name), axis)
            cut_layer(model, name, axis, positions)
            after = axes.stored_width(axes.find(model, name), axis)
            if after != before - len(positions) or after != axes.width(axes.find(model, name), axis):
                raise RuntimeError(f"{name} has {after} {axis} channels, expected {before - len(positions)}")
        for (first, key), *others in shared:
            for name, other in others:
                setattr(model.get_submodule(name), other, getattr(model.get_submodule(first), key))


def trace_groups(model: nn.Module, example_input: Any) -> ChannelGraph:
    """Traces `model` and finds its groups of coupled channels. The model is left as it was found.

    A network that was traced a moment ago, or a copy of it, is not traced again, see `known`.
    Whole attention heads are groups too, and the width of heads (see `heads`), named after the module that attends.
    Protected, with the reason: the classifier's output; channels joined with the network's input; channels under
    a norm that mixes all of them (LayerNorm, GroupNorm of one group) or under attention; zeros of a parameter-
    free channel padding; parts of unequal length; layers with reparametrised weights; and whatever else the
    checks contradict. Grouped convolutions lose whole groups (or the same places of each, where groups are few
    and wide), GroupNorm whole groups, the parts of a split and the rows of a shuffle the same places, pixel
    shuffles whole blocks; layers that share a weight are cut together.
    Layers that run in training alone (auxiliary heads) lose channels with the others.

    Args:
        model: any network that runs on a batch of images; its parameters may be frozen, the caller may be
            under `torch.no_grad()`.
        example_input: a tensor [B, ...], a tuple of arguments or a dictionary of them; one sample is used.

    Returns:
        The groups in module order; the positions of different prunable groups are disjoint, but for heads and the
        widths of the same heads.

    Raises:
        InputError: the network does not run on `example_input`, its weights are not finite (no check of positions would
            say anything), or which layers run depends on values of the input (no plan would be right for all).
    """
    check_defined(dict(model.named_parameters()), "model")  # an observer's buffers begin at infinity
    with traceable(model), opened(model):
        sample = one_sample(model, example_input)
        return once(model, sample, partial(_find_groups, model, sample))


def _find_groups(model: nn.Module, sample: Example) -> ChannelGraph:
    """The groups of a network that is `traceable` and `opened`."""
    try:
        proposal = propose_groups(model, sample)
    except Exception:
        run(model, sample)  # says so if it is the network that fails
        raise
    drafts, sites = proposal.drafts, probe.find_sites(model, proposal.asides)
    free = [draft.group for draft in drafts if not draft.group.protected]
    wrong = trial.find_impossible(model, sample, free, sites)
    heads = head_groups(model, sample) if proposal.attends else []
    widths = sites.widths | axis_widths(model, [*heads, *(draft.group for draft in drafts)])
    protected = [replace(d.group, protected=d.group.protected or wrong.get(d.group.name, "")) for d in drafts]
    groups = with_heads(assign_roles(model, protected, drafts), heads)
    return ChannelGraph(tuple(with_kind(model, group) for group in groups), widths)
