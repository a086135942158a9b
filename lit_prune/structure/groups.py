"""Groups of coupled channels: which positions of which layers go together when one channel goes.

The only user of Torch-Pruning. Its dependency graph proposes the groups and its layer functions do the cutting; in
between, every proposal is checked here, because the graph follows indices by rules of thumb: a group is kept for
pruning only if marks put on its channels arrive where it says (`probe`). The others are listed too, with the reason.
"""

import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_prune.errors import InputError
from lit_prune.structure import axes, probe, protection
from lit_prune.structure.axes import PaddedShortcut
from lit_prune.structure.tracing import one_image, run, undisturbed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_pruning as tp


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
    """Channels that can only be removed together.

    Attributes:
        name: qualified name of the first producing convolution or linear layer, in module order.
        size: number of units.
        members: every axis that loses positions.
        protected: "" or the reason why no unit may be removed.
        producers: convolutions and linear layers (depthwise ones left out) that write the channels.
        consumers: convolutions and linear layers that read them.
        role: "planes" (trunk, see `group_role`) or "mid".
    """

    name: str
    size: int
    members: tuple[Member, ...]
    protected: str = ""
    producers: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    role: str = "mid"


def group_role(group: Group) -> str:
    """Role of a group in a network of blocks: "planes" or "mid".

    "planes" is the trunk: channels that a residual add joins from several producers (the stem too where its output
    feeds the first add), channels that pass through a padded shortcut, a stem that both the first block and its
    projection shortcut read, and the projection that closes an inverted residual without a shortcut (it reads a
    depthwise convolution, its own channels have none). Everything else is "mid": the width inside a block, with one
    producer and perhaps a depthwise convolution or a gate that follows it. Plain networks (VGG, AlexNet) and
    DenseNets have only "mid" groups.
    """
    return group.role


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
        lost: dict[axes.Axis, set[int]] = {}
        for name, units in removed.items():
            group = _checked(self.by_name, name, units)
            for member in group.members if units else ():
                lost.setdefault((member.module, member.axis), set()).update(
                    position for unit in set(units) for position in member.positions[unit]
                )
        if not lost:
            raise InputError(f"removed={dict(removed)} removes no channel; name at least one unit of one group")
        return {key: sorted(positions) for key, positions in lost.items()}

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
        sites = _sites(model)
        drafts = _propose(model, image, sites)
        reasons = _contradictions(model, image, drafts, sites)
    protected = [replace(d.group, protected=d.group.protected or reasons.get(d.group.name, "")) for d in drafts]
    return ChannelGraph(_with_roles(model, protected, drafts), sites.widths)


@dataclass(frozen=True)
class _Draft:
    """A proposed group, the operations its channels pass through, and whether an addition joins several producers."""

    group: Group
    operations: frozenset[str]
    joined: bool


def _contradictions(model: nn.Module, image: Tensor, drafts: list[_Draft], sites: probe.Sites) -> dict[str, str]:
    """Name -> reason for the groups that the network itself contradicts."""
    free = [draft.group for draft in drafts if not draft.group.protected]
    reasons = dict.fromkeys(probe.find_fed_by_input(model, image, free, sites), protection.INPUT)
    misled = probe.find_misled(model, image, [group for group in free if group.name not in reasons], sites)
    return reasons | {d.group.name: protection.suspicion(d.operations) for d in drafts if d.group.name in misled}


def _sites(model: nn.Module) -> probe.Sites:
    """Where the probe marks and looks: every layer where channels end, begin or pass one by one."""
    sites = probe.Sites()
    for name, module in model.named_modules():
        if axes.is_boundary(module):
            sites.writers[name] = sites.readers[name] = module
            sites.widths |= {(name, axis): axes.width(module, axis) for axis in ("out", "in")}
        elif axes.is_channelwise(module) and not _is_single_prelu(module):
            sites.passers[name] = module
            sites.widths[name, "out"] = axes.width(module, "out")
    sites.widths |= {(name, "out"): parameter.numel() for name, parameter in model.named_parameters()}
    return sites


def _with_roles(model: nn.Module, groups: list[Group], drafts: list[_Draft]) -> tuple[Group, ...]:
    """The groups with their roles, see `group_role`."""
    joined = {name for draft in drafts if draft.joined for name in draft.group.producers}
    sure = [draft.joined or protection.is_trunk(model, draft.group, joined) for draft in drafts]
    read: dict[str, tuple[str, ...]] = {}  # layer -> producers of the depthwise width inside a block that it reads
    for group, trunk in zip(groups, sure, strict=True):
        if not trunk and protection.has_depthwise(model, group.members):
            read |= dict.fromkeys(group.consumers, group.producers)
    roles = [
        "planes" if trunk or protection.is_projection(model, group, read) else "mid"
        for group, trunk in zip(groups, sure, strict=True)
    ]
    return tuple(replace(group, role=role) for group, role in zip(groups, roles, strict=True))


def _is_single_prelu(module: object) -> bool:
    """A PReLU with one parameter for all channels is an activation like any other."""
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


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


def _propose(model: nn.Module, image: Tensor, sites: probe.Sites) -> list[_Draft]:
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
    shared = protection.shared_weights(model)
    overlaps = protection.overlapping([draft.group.members for draft in drafts])
    for position, (draft, overlap) in enumerate(zip(drafts, overlaps, strict=True)):
        reason = draft.group.protected or (protection.OVERLAP if overlap else "")
        if not reason and any(member.module in shared for member in draft.group.members):
            reason = "its layers share weights"
        drafts[position] = replace(draft, group=replace(draft.group, protected=reason))
    return drafts


@contextmanager
def _bounded(widest: int) -> Iterator[list]:
    """Keeps Torch-Pruning from doing the same work again and again while its graph is built and asked.

    It maps indices once when it builds the graph, and not again for every group: nothing is cut in between. It infers
    the channels of a node once, not on every path to it, of which there are 2^L in a network of L residual adds. A
    reshape that it cannot map (division by zero on a channel shuffle) stays unmapped. A group that claims more channels
    than the widest layer has, or meets every edge many times (an endless round between reshapes), is given up with an
    OverflowError. Where any of this leaves a map out, the check of positions rejects the group.
    """
    mapping, shapes = tp.dependency.index_mapping, tp.dependency.shape_infer
    proposal = tp.dependency.Group
    update, reshape, add = mapping.update_index_mapping, mapping.update_reshape_index_mapping, proposal.add_dep
    known: dict[tuple, int | None] = {}
    edges: list[int] = []
    latest: list[tp.dependency.Group] = []

    def remembered(infer: Callable) -> Callable:
        def infer_once(graph: tp.DependencyGraph, node: tp.dependency.Node, recursive_depth: list) -> int | None:
            if (infer, node) not in known:
                known[infer, node] = infer(graph, node, recursive_depth)
            return known[infer, node]

        return infer_once

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
        self.hopeless = getattr(self, "hopeless", False) or dep.target.type in _FORBIDDEN
        endless = len(idxs) > widest or len(self) > edges[0]
        if endless or (self.hopeless and self.claims > _ENOUGH):
            raise LookupError("a group without end")

    with (
        patch.multiple(mapping, update_index_mapping=update_once, update_reshape_index_mapping=reshape_or_leave),
        patch.multiple(shapes, **{name: remembered(getattr(shapes, name)) for name in _INFERENCES}),
        patch.object(proposal, "add_dep", add_or_give_up),
    ):
        yield latest


_INFERENCES = ("infer_out_channels_recursively", "infer_in_channels_recursively")


_FORBIDDEN = (tp.ops.OPTYPE.LN, tp.ops.OPTYPE.GN, tp.ops.OPTYPE.MHA)
_ENOUGH = 50_000  # channels claimed in all, a fraction of a second's work


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


def _drafts(model: nn.Module, graph: tp.DependencyGraph, inside: set, latest: list) -> Iterator[_Draft]:
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
        for members in _alike(rows, len(rest)):
            group = _group(model, name, members, names, operations)
            names.add(group.name)
            yield _Draft(group, frozenset(operations), joined)


def _operations(proposal: tp.dependency.Group, inside: set) -> tuple[set[str], bool]:
    """Names of the operations between the layers of a proposal, and whether an addition joins several branches."""
    operations, joined = set(), False
    for item in proposal:
        node = item.dep.target
        operation = node.grad_fn
        if node.type == tp.ops.OPTYPE.OUTPUT:
            operations.add("output")
        if node.name and node.type in _LAYER_TYPES or operation in inside or not hasattr(operation, "name"):
            continue
        operations.add(operation.name())
        if "constantpad" in operation.name().lower() and any(operation._saved_pad[4:]):
            operations.add("channel padding")
        branches = {id(before) for before in node.inputs if before.type != tp.ops.OPTYPE.PARAMETER}
        joined |= len(branches) > 1 and operation.name().startswith(("AddBackward", "SubBackward"))
    return operations, joined


_LAYER_TYPES = (
    tp.ops.OPTYPE.CONV,
    tp.ops.OPTYPE.DEPTHWISE_CONV,
    tp.ops.OPTYPE.LINEAR,
    tp.ops.OPTYPE.BN,
    tp.ops.OPTYPE.PRELU,
    tp.ops.OPTYPE.LN,
    tp.ops.OPTYPE.GN,
    tp.ops.OPTYPE.IN,
    tp.ops.OPTYPE.EMBED,
    tp.ops.OPTYPE.LSTM,
    tp.ops.OPTYPE.MHA,
    tp.ops.OPTYPE.PARAMETER,
    tp.ops.OPTYPE.CUSTOMIZED,
)


def _rows(graph: tp.DependencyGraph, proposal: tp.dependency.Group, units: list[int], operations: set[str]) -> dict:
    """(name, axis) -> for each unit the list of its positions, in the order of the proposal."""
    order = {unit: row for row, unit in enumerate(units)}
    rows: dict[axes.Axis, list[list[int]]] = {}
    for item in proposal:
        node = item.dep.target
        if node.type not in _LAYER_TYPES or _is_single_prelu(node.module):
            continue
        names = graph._param_to_name if node.type == tp.ops.OPTYPE.PARAMETER else graph._module2name
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


def _alike(rows: dict[axes.Axis, list[list[int]]], size: int) -> list[tuple[Member, ...]]:
    """Members for each set of units that take the same number of positions everywhere (concatenation splits them)."""
    kinds: dict[tuple[int, ...], list[int]] = {}
    for unit in range(size):
        kinds.setdefault(tuple(len(set(row[unit])) for row in rows.values()), []).append(unit)
    return [
        tuple(
            Member(name, axis, tuple(tuple(sorted(set(row[unit]))) for unit in units))
            for count, ((name, axis), row) in zip(counts, rows.items(), strict=True)
            if count
        )
        for counts, units in kinds.items()
    ]


def _group(model: nn.Module, root: str, members: tuple[Member, ...], taken: set[str], operations: set[str]) -> Group:
    """A group with its name, roles of layers, and what its layers forbid."""
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    weighted = [m for m in members if m.module in order and axes.is_weighted(model.get_submodule(m.module))]
    mixing = [m for m in weighted if not axes.is_depthwise(model.get_submodule(m.module))]
    producers = sorted({m.module for m in mixing if m.axis == "out"}, key=order.__getitem__)
    consumers = sorted({m.module for m in mixing if m.axis == "in"}, key=order.__getitem__)
    free = [name for name in (*producers, root) if name not in taken]
    name = free[0] if free else f"{root}:{len(taken)}"
    reason = protection.structural_reason(model, members, operations)
    return Group(name, len(members[0].positions), members, reason, tuple(producers), tuple(consumers))


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
