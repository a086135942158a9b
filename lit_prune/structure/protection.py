"""Why a group of channels may not be pruned, and whether it is trunk or inside of a block."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import nn
from torch.nn.utils import parametrize

from lit_prune.structure import axes

OUTPUT = "it is the network's output"
INPUT = "it is joined with the network's input"
ATTENTION = "its channels take part in attention"
PADDING = "its channels pass through a parameter-free channel padding, which shifts their positions"
UNTRACKED = "its channels cannot be followed through a split, reshape or unknown operation"
OVERLAP = "it claims positions that another group claims too"
_ATTENTION_OPERATIONS = ("scaleddotproduct", "bmm")


class _Member(Protocol):
    module: str
    axis: str
    positions: tuple[tuple[int, ...], ...]


class _Group(Protocol):
    members: tuple[_Member, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


def structural_reason(model: nn.Module, members: Sequence[_Member], operations: Iterable[str]) -> str:
    """Why a group may not be pruned as far as its layers tell; "" where they allow it.

    Args:
        model: the network.
        members: the members of the group.
        operations: names of the operations between them: autograd names, "output", "untracked", "channel padding".
    """
    if any(word in operation.lower() for operation in operations for word in _ATTENTION_OPERATIONS):
        return ATTENTION
    parts = sorted(
        ((m.module, axes.find(model, m.module)) for m in members), key=lambda p: isinstance(p[1], nn.Parameter)
    )
    reason = next((reason for name, module in parts if (reason := _layer_reason(name, module))), "")
    if reason or "untracked" in operations:
        return reason or (PADDING if "channel padding" in operations else UNTRACKED)
    if "output" in operations or not any(member.axis == "in" for member in members):
        return OUTPUT
    return PADDING if "channel padding" in operations else ""


def _layer_reason(name: str, module: nn.Module | nn.Parameter) -> str:
    """Why the channels of one member may not be removed, or ""."""
    if isinstance(module, nn.MultiheadAttention):
        return ATTENTION
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return f"they pass through {name} ({type(module).__name__}), whose statistics would change"
    if isinstance(module, nn.Parameter):
        vector = sum(size > 1 for size in module.shape) == 1
        return "" if vector else f"parameter {name} {list(module.shape)} has no axis known to be the channels"
    if not axes.is_boundary(module) and not axes.is_channelwise(module):
        return f"they pass through {name} ({type(module).__name__}), which cannot be cut"
    return _weight_reason(name, module)


def _weight_reason(name: str, module: nn.Module) -> str:
    """Why the tensors of a cuttable layer forbid it, or ""."""
    if isinstance(module, axes.CONVOLUTIONS) and module.groups > 1 and not axes.is_depthwise(module):
        return f"{name} is a grouped convolution"
    if isinstance(module, axes.INSTANCE_NORMS) and module.track_running_stats:
        return f"{name} is an InstanceNorm with running statistics"
    extra = {key for key, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}
    if extra or parametrize.is_parametrized(module):
        return f"the weights of {name} are reparametrised"
    return ""


def shared_axes(model: nn.Module) -> set[axes.Axis]:
    """Axes of layers that cannot lose positions because another module holds the same parameter.

    A shared weight forbids both axes, any other shared parameter (a bias) the output.
    """
    holders: dict[int, list[tuple[str, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((name, key))
    shared = [site for sites in holders.values() if len(sites) > 1 for site in sites]
    return {(name, "out") for name, _ in shared} | {(name, "in") for name, key in shared if key == "weight"}


def overlapping(groups: Sequence[tuple[_Member, ...]]) -> list[bool]:
    """For each group (given by its members) whether it claims a position that another one claims too."""
    claims = [
        {(m.module, m.axis, position) for m in members for unit in m.positions for position in unit}
        for members in groups
    ]
    counts = Counter(claim for group in claims for claim in group)
    return [any(counts[claim] > 1 for claim in group) for group in claims]


def suspicion(operations: Iterable[str]) -> str:
    """The likely reason why the check of positions failed for a group with these operations."""
    if any("softmax" in operation.lower() for operation in operations):
        return ATTENTION
    if any("constantpad" in operation.lower() for operation in operations):
        return PADDING
    return "its channels do not keep their positions (shuffle, reshape, mixing or an operation that is not known)"


def has_depthwise(model: nn.Module, members: Iterable[_Member]) -> bool:
    """Whether a depthwise convolution follows the channels."""
    return any(axes.is_depthwise(axes.find(model, member.module)) for member in members)


def is_trunk(model: nn.Module, group: _Group, joined: set[str]) -> bool:
    """Whether the channels pass through a padded shortcut or are read by a block and by its projection shortcut.

    Args:
        model: the network.
        group: the group.
        joined: layers whose outputs an addition joins.
    """
    if any(isinstance(axes.find(model, member.module), axes.PaddedShortcut) for member in group.members):
        return True
    return len(group.producers) == 1 and 0 < sum(name in joined for name in group.consumers) < len(group.consumers)


def is_projection(model: nn.Module, group: _Group, read: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether the channels leave an inverted residual: they read its depthwise width, and no gate leads back to it.

    Args:
        model: the network.
        group: the group.
        read: layer -> producers of the depthwise width inside a block that the layer reads.
    """
    sources = [read[name] for name in group.producers if name in read]
    gate = any(name in producers for producers in sources for name in group.consumers)
    return bool(sources) and not gate and not has_depthwise(model, group.members)
