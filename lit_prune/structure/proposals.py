"""Groups of coupled channels as Torch-Pruning's dependency graph proposes them, within bounds of time."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from unittest.mock import patch

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_prune.structure import axes, probe, protection
from lit_prune.structure.axes import PaddedShortcut
from lit_prune.structure.coupling import Draft, assemble_group, members_alike
from lit_prune.structure.example import Example
from lit_prune.structure.pruners import FrozenNormPruner, ShortcutPruner

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_pruning as tp

_TYPES = tp.ops.OPTYPE
_FORBIDDEN = (_TYPES.LN, _TYPES.GN, _TYPES.MHA)
_LAYERS = (
    *_FORBIDDEN,
    *(_TYPES.CONV, _TYPES.DEPTHWISE_CONV, _TYPES.LINEAR, _TYPES.BN, _TYPES.IN, _TYPES.PRELU),
    *(_TYPES.EMBED, _TYPES.LSTM, _TYPES.PARAMETER, _TYPES.CUSTOMIZED),
)
_ENOUGH = 50_000  # channels claimed by a group that cannot be pruned anyway: a fraction of a second's work
_TOO_MANY = 1_000_000  # channels claimed by any group: ten times those of a wide ResNet's trunk


def propose_groups(model: nn.Module, sample: Example, sites: probe.Sites) -> list[Draft]:
    """Groups as Torch-Pruning's dependency graph sees them, with what the layers forbid, in module order."""
    inside: set = set()  # operations inside padded shortcuts, which are followed as one
    graph = tp.DependencyGraph()
    with warnings.catch_warnings(), _bounded(max(sites.widths.values(), default=1)) as latest:
        warnings.simplefilter("ignore")
        graph.build_dependency(
            model,
            sample,
            forward_fn=lambda network, sample: _forward(network, sample, inside),
            customized_pruners={PaddedShortcut: ShortcutPruner(), **_frozen_norms(model)},
            verbose=False,
        )
        drafts = list(_drafts(model, graph, inside, latest, sites.widths))
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


def _frozen_norms(model: nn.Module) -> dict[type, FrozenNormPruner]:
    """How Torch-Pruning is to treat the norms of this network that keep everything in buffers."""
    return {type(module): FrozenNormPruner() for module in model.modules() if axes.is_frozen_norm(module)}


def _remembered(infer: Callable) -> Callable:
    """`infer(graph, node, recursive_depth)`, asked once for each node."""
    known: dict[tp.dependency.Node, int | None] = {}

    def infer_once(graph: tp.DependencyGraph, node: tp.dependency.Node, recursive_depth: list) -> int | None:
        if node not in known:
            known[node] = infer(graph, node, recursive_depth)
        return known[node]

    return infer_once


def _forward(model: nn.Module, sample: Example, inside: set) -> list[Tensor]:
    """Outputs of the network that depend on its parameters; notes the operations inside padded shortcuts."""

    def note(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        pending = [output.grad_fn]
        while pending:
            operation = pending.pop()
            if operation is not None and operation is not args[0].grad_fn and operation not in inside:
                inside.add(operation)
                pending.extend(before for before, _ in operation.next_functions)

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, PaddedShortcut)]
    output = model(*sample.args, **sample.kwargs)
    for handle in handles:
        handle.remove()
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]


def _drafts(
    model: nn.Module, graph: tp.DependencyGraph, inside: set, latest: list, widths: Mapping[axes.Axis, int]
) -> Iterator[Draft]:
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
        rows = _rows(graph, proposal, rest, operations, widths) or {(name, "out"): [[channel] for channel in rest]}
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
        if (node.name and node.type in _LAYERS) or operation in inside or not hasattr(operation, "name"):
            continue
        operations.add(operation.name())
        if "constantpad" in operation.name().lower() and any(operation._saved_pad[4:]):  # noqa: SLF001  (autograd's name)
            operations.add("channel padding")
        branches = {id(before) for before in node.inputs if before.type != _TYPES.PARAMETER}
        joined |= len(branches) > 1 and operation.name().startswith(("AddBackward", "SubBackward"))
    return operations, joined


def _rows(
    graph: tp.DependencyGraph,
    proposal: tp.dependency.Group,
    units: list[int],
    operations: set[str],
    widths: Mapping[axes.Axis, int],
) -> dict:
    """(name, axis) -> for each unit the list of its positions, in the order of the proposal.

    A position that the layer does not have (Torch-Pruning's maps of splits and pixel shuffles can be wrong) is left out
    and noted as "untracked".
    """
    order = {unit: row for row, unit in enumerate(units)}
    rows: dict[axes.Axis, list[list[int]]] = {}
    for item in proposal:
        node = item.dep.target
        if node.type not in _LAYERS or axes.is_single_prelu(node.module):
            continue
        names = graph._param_to_name if node.type == _TYPES.PARAMETER else graph._module2name  # noqa: SLF001
        axis = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        name = names[node.module]
        row = rows.setdefault((name, axis), [[] for _ in units])
        width = widths.get((name, axis), math.inf)
        for position, root in zip(item.idxs, item.root_idxs or item.idxs, strict=True):
            if item.root_idxs is None:  # given up before Torch-Pruning took the pairs apart
                position, root = root
            if root not in order or position >= width:
                operations.add("untracked")
            else:
                row[order[root]].append(position)
    return rows
