"""Groups of coupled channels: which positions of which layers go together when one channel goes.

The only user of Torch-Pruning. Its dependency graph proposes the groups and its layer functions do the cutting; in
between, every proposal is checked here, because the graph follows indices by rules of thumb: a group is kept for
pruning only if marks put on its channels arrive where it says (`probe`). The others are listed too, with the reason.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_prune.structure import axes, probe, protection
from lit_prune.structure.axes import PaddedShortcut
from lit_prune.structure.coupling import (
    Draft,
    Group,
    Member,
    assemble_group,
    assign_roles,
    group_role,
    lost_positions,
    members_alike,
)
from lit_prune.structure.tracing import one_image, run, undisturbed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_pruning as tp

__all__ = ["ChannelGraph", "Group", "Member", "group_role", "trace_groups"]

_TYPES = tp.ops.OPTYPE
_FORBIDDEN = (_TYPES.LN, _TYPES.GN, _TYPES.MHA)
_LAYERS = (
    *_FORBIDDEN,
    *(_TYPES.CONV, _TYPES.DEPTHWISE_CONV, _TYPES.LINEAR, _TYPES.BN, _TYPES.IN, _TYPES.PRELU),
    *(_TYPES.EMBED, _TYPES.LSTM, _TYPES.PARAMETER, _TYPES.CUSTOMIZED),
)
_ENOUGH = 50_000  # channels claimed by a group that cannot be pruned anyway: a fraction of a second's work
_TOO_MANY = 1_000_000  # channels claimed by any group: ten times those of a wide ResNet's trunk


@dataclass(frozen=True)
class ChannelGraph:
    """All groups of a network, in module order.

    Attributes:
        groups: the groups, prunable or protected.
        widths: (module, axis) -> number of channels when traced, for every axis that belongs to a group.
    """

    groups: tuple[Group, ...]
    widths: Mapping[axes.Axis, int] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> dict[str, Group]:
        """Name -> group."""
        return {group.name: group for group in self.groups}

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups that are not protected."""
        return tuple(group for group in self.groups if not group.protected)

    def removed_positions(self, removed: Mapping[str, Sequence[int]]) -> dict[axes.Axis, list[int]]:
        """Positions that each (module, axis) loses when the groups lose the given units.

        Raises:
            InputError: unknown or protected group, unit out of range, nothing removed, or nothing left of a group.
        """
        return lost_positions(self.by_name, removed)

    def remove(self, model: nn.Module, removed: Mapping[str, Sequence[int]]) -> None:
        """Removes units from `model` in place: weights, gradients, statistics and the attributes that state a width.

        The network must be the traced one or a copy. `requires_grad` flags, training flags, device, precision and
        memory format stay. Optimizers that hold the old parameters do not follow.

        Args:
            model: the network.
            removed: group name -> units to remove.

        Raises:
            InputError: as in `removed_positions`.
            RuntimeError: a layer has not the expected width afterwards; it is named.
        """
        for (name, axis), positions in self.removed_positions(removed).items():
            before = axes.width(axes.find(model, name), axis)
            _cut(model, name, axis, positions)
            after = axes.stored_width(axes.find(model, name), axis)
            if after != before - len(positions) or after != axes.width(axes.find(model, name), axis):
                raise RuntimeError(f"{name} has {after} {axis} channels, expected {before - len(positions)}")


def trace_groups(model: nn.Module, example_input: Tensor) -> ChannelGraph:
    """Traces `model` and finds its groups of coupled channels. The model is left as it was found.

    Protected, with the reason: the classifier's output; channels joined with the network's input; channels under a
    norm that mixes channels (LayerNorm, GroupNorm) or under attention, so ConvNeXt and vision transformers lose MLP
    width only; channels through a parameter-free channel padding; grouped convolutions; layers with shared or
    reparametrised weights; and whatever else the check of positions contradicts. `PaddedShortcut` is followed exactly.
    Layers that do not run in evaluation mode (auxiliary heads) are not followed.

    Args:
        model: any network that runs on a batch of images; its parameters may be frozen, the caller may be
            under `torch.no_grad()`.
        example_input: [B, C, H, W]; only the first image is used.

    Returns:
        The groups in module order; the positions of different prunable groups are disjoint.

    Raises:
        InputError: the network does not run on `example_input`.
    """
    with undisturbed(model):
        image = one_image(model, example_input)
        run(model, image)
        sites = probe.find_sites(model)
        drafts = _propose(model, image, sites)
        reasons = _contradictions(model, image, drafts, sites)
    protected = [replace(d.group, protected=d.group.protected or reasons.get(d.group.name, "")) for d in drafts]
    return ChannelGraph(assign_roles(model, protected, drafts), sites.widths)


def _contradictions(model: nn.Module, image: Tensor, drafts: list[Draft], sites: probe.Sites) -> dict[str, str]:
    """Name -> reason for the groups that the network itself contradicts."""
    free = [draft.group for draft in drafts if not draft.group.protected]
    reasons = dict.fromkeys(probe.find_fed_by_input(model, image, free, sites), protection.INPUT)
    misled = probe.find_misled(model, image, [group for group in free if group.name not in reasons], sites)
    return reasons | {d.group.name: protection.suspicion(d.operations) for d in drafts if d.group.name in misled}


def _propose(model: nn.Module, image: Tensor, sites: probe.Sites) -> list[Draft]:
    """Groups as Torch-Pruning's dependency graph sees them, with what the layers forbid, in module order."""
    inside: set = set()  # operations inside padded shortcuts, which are followed as one
    graph = tp.DependencyGraph()
    with warnings.catch_warnings(), _bounded(max(sites.widths.values(), default=1)) as latest:
        warnings.simplefilter("ignore")
        graph.build_dependency(
            model,
            image,
            forward_fn=lambda network, images: _forward(network, images, inside),
            customized_pruners={PaddedShortcut: _ShortcutPruner()},
            verbose=False,
        )
        drafts = list(_drafts(model, graph, inside, latest))
    shared = protection.shared_axes(model)
    overlaps = protection.overlapping([draft.group.members for draft in drafts])
    for position, (draft, overlap) in enumerate(zip(drafts, overlaps, strict=True)):
        reason = draft.group.protected or (protection.OVERLAP if overlap else "")
        if not reason and any((m.module, m.axis) in shared for m in draft.group.members):
            reason = "its layers share weights"
        drafts[position] = replace(draft, group=replace(draft.group, protected=reason))
    return drafts


@contextmanager
def _bounded(widest: int) -> Iterator[list]:
    """Keeps Torch-Pruning within bounds of time while its graph is built and asked for groups.

    It maps indices once when it builds the graph, and not again for every group: nothing is cut in between. It infers
    the channels of a node once, not on every path to it, of which there are 2^L in a network of L residual adds. A
    reshape that it cannot map (division by zero on a channel shuffle) stays unmapped; the check of positions then
    rejects the group. A group that claims more channels than the widest layer has, or meets more edges than there are
    (an endless round between reshapes; real groups meet a quarter of them), is given up with a LookupError, and so is a
    large one that has met a layer which forbids pruning.

    Yields:
        A list with the latest group, complete or not.
    """
    mapping, shapes, group = tp.dependency.index_mapping, tp.dependency.shape_infer, tp.dependency.Group
    update, reshape, add = mapping.update_index_mapping, mapping.update_reshape_index_mapping, group.add_dep
    edges: list[int] = []
    latest: list[tp.dependency.Group] = []

    def update_once(graph: tp.DependencyGraph) -> None:
        if not edges:
            edges.append(sum(len(node.dependencies) for node in graph.module2node.values()))
            update(graph)

    def reshape_or_leave(graph: tp.DependencyGraph, node: tp.dependency.Node) -> None:
        with suppress(ZeroDivisionError):
            reshape(graph, node)

    def add_or_give_up(self: tp.dependency.Group, dep: tp.dependency.Dependency, idxs: list) -> None:
        add(self, dep, idxs)
        latest[:] = [self]
        self.claims = getattr(self, "claims", 0) + len(idxs)
        self.forbidden = getattr(self, "forbidden", False) or dep.target.type in _FORBIDDEN
        limit = _ENOUGH if self.forbidden else _TOO_MANY
        if len(idxs) > widest or len(self) > edges[0] or self.claims > limit:
            raise LookupError("a group without end")

    inferences = ("infer_out_channels_recursively", "infer_in_channels_recursively")
    with (
        patch.multiple(mapping, update_index_mapping=update_once, update_reshape_index_mapping=reshape_or_leave),
        patch.multiple(shapes, **{name: _remembered(getattr(shapes, name)) for name in inferences}),
        patch.object(group, "add_dep", add_or_give_up),
    ):
        yield latest


def _remembered(infer: Callable) -> Callable:
    """`infer(graph, node, recursive_depth)`, asked once for each node."""
    known: dict[tp.dependency.Node, int | None] = {}

    def infer_once(graph: tp.DependencyGraph, node: tp.dependency.Node, recursive_depth: list) -> int | None:
        if node not in known:
            known[node] = infer(graph, node, recursive_depth)
        return known[node]

    return infer_once


def _forward(model: nn.Module, image: Tensor, inside: set) -> list[Tensor]:
    """Outputs of the network that depend on its parameters; notes the operations inside padded shortcuts."""

    def note(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        pending = [output.grad_fn]
        while pending:
            operation = pending.pop()
            if operation is not None and operation is not args[0].grad_fn and operation not in inside:
                inside.add(operation)
                pending.extend(before for before, _ in operation.next_functions)

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, PaddedShortcut)]
    output = model(image)
    for handle in handles:
        handle.remove()
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]


def _drafts(model: nn.Module, graph: tp.DependencyGraph, inside: set, latest: list) -> Iterator[Draft]:
    """Asks for the group of every output channel that no earlier group has claimed."""
    covered: dict[str, set[int]] = {}
    names: set[str] = set()
    for name, module in model.named_modules():
        if not axes.is_weighted(module) or module not in graph.module2node:
            continue
        claimed = covered.get(name, set())
        rest = [channel for channel in range(axes.width(module, "out")) if channel not in claimed]
        if not rest:
            continue
        prune = graph.get_pruner_of_module(module).prune_out_channels
        failed = False
        try:
            proposal = graph.get_pruning_group(module, prune, rest)
        except (ArithmeticError, LookupError):  # its maps of splits and reshapes can be wrong
            failed, proposal = True, latest[0].items
        operations, joined = _operations(proposal, inside)
        rows = _rows(graph, proposal, rest, operations) or {(name, "out"): [[channel] for channel in rest]}
        if failed:
            operations.add("untracked")
        for (member, axis), positions in rows.items():
            if axis == "out":
                covered.setdefault(member, set()).update(position for unit in positions for position in unit)
        for members in members_alike(rows, len(rest)):
            group = assemble_group(model, name, members, names, operations)
            names.add(group.name)
            yield Draft(group, frozenset(operations), joined)


def _operations(proposal: tp.dependency.Group, inside: set) -> tuple[set[str], bool]:
    """Names of the operations between the layers of a proposal, and whether an addition joins several branches."""
    operations, joined = set(), False
    for item in proposal:
        node = item.dep.target
        operation = node.grad_fn
        if node.type == _TYPES.OUTPUT:
            operations.add("output")
        if node.name and node.type in _LAYERS or operation in inside or not hasattr(operation, "name"):
            continue
        operations.add(operation.name())
        if "constantpad" in operation.name().lower() and any(operation._saved_pad[4:]):
            operations.add("channel padding")
        branches = {id(before) for before in node.inputs if before.type != _TYPES.PARAMETER}
        joined |= len(branches) > 1 and operation.name().startswith(("AddBackward", "SubBackward"))
    return operations, joined


def _rows(graph: tp.DependencyGraph, proposal: tp.dependency.Group, units: list[int], operations: set[str]) -> dict:
    """(name, axis) -> for each unit the list of its positions, in the order of the proposal."""
    order = {unit: row for row, unit in enumerate(units)}
    rows: dict[axes.Axis, list[list[int]]] = {}
    for item in proposal:
        node = item.dep.target
        if node.type not in _LAYERS or axes.is_single_prelu(node.module):
            continue
        names = graph._param_to_name if node.type == _TYPES.PARAMETER else graph._module2name
        axis = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        row = rows.setdefault((names[node.module], axis), [[] for _ in units])
        for position, root in zip(item.idxs, item.root_idxs or item.idxs, strict=True):
            if item.root_idxs is None:  # given up before Torch-Pruning took the pairs apart
                position, root = root
            if root not in order:
                operations.add("untracked")
            else:
                row[order[root]].append(position)
    return rows


class _ShortcutPruner(tp.pruner.function.BasePruningFunc):
    """Tells Torch-Pruning that the two sides of a `PaddedShortcut` lose channels independently."""

    def prune_out_channels(self, layer: PaddedShortcut, idxs: Sequence[int]) -> nn.Module:
        layer.prune_out(idxs)
        return layer

    def prune_in_channels(self, layer: PaddedShortcut, idxs: Sequence[int]) -> nn.Module:
        layer.prune_in(idxs)
        return layer

    def get_out_channels(self, layer: PaddedShortcut) -> int:
        return layer.out_channels

    def get_in_channels(self, layer: PaddedShortcut) -> int:
        return layer.in_channels


_CUTTERS = (
    (axes.is_depthwise, tp.pruner.function.DepthwiseConvPruner()),
    (lambda module: isinstance(module, axes.CONVOLUTIONS), tp.pruner.function.ConvPruner()),
    (lambda module: isinstance(module, nn.Linear), tp.pruner.function.LinearPruner()),
    (lambda module: isinstance(module, axes.BATCH_NORMS), tp.pruner.function.BatchnormPruner()),
    (lambda module: isinstance(module, axes.INSTANCE_NORMS), tp.pruner.function.InstanceNormPruner()),
    (lambda module: isinstance(module, nn.PReLU), tp.pruner.function.PReLUPruner()),
    (lambda module: isinstance(module, PaddedShortcut), _ShortcutPruner()),
)


def _cut(model: nn.Module, name: str, axis: str, positions: list[int]) -> None:
    """Removes positions from one axis of one layer or bare parameter; flags and memory format stay."""
    target = axes.find(model, name)
    holder = model.get_submodule(name.rpartition(".")[0]) if isinstance(target, nn.Parameter) else target
    before = dict(holder.named_parameters(recurse=False))
    if holder is target:
        cutter = next(cutter for fits, cutter in _CUTTERS if fits(target))
        (cutter.prune_out_channels if axis == "out" else cutter.prune_in_channels)(target, positions)
    else:
        dim = max(range(target.dim()), key=lambda d: target.shape[d])
        pruner = tp.pruner.function.ParameterPruner(pruning_dim=dim)
        setattr(holder, name.rpartition(".")[2], pruner.prune_out_channels(target, positions))
    for key, parameter in holder.named_parameters(recurse=False):
        parameter.requires_grad_(before[key].requires_grad)
        if _is_channels_last(before[key]):
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _is_channels_last(tensor: Tensor) -> bool:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()
