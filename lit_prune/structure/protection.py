"""Why a group of channels may not be pruned, and whether it is trunk or inside of a block."""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Protocol

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lit_prune.structure import axes

OUTPUT = "it is the network's output"
INPUT = "it is joined with the network's input"
ATTENTION = "its channels take part in attention"
PADDING = "its channels pass through a parameter-free channel padding, which shifts their positions"
UNTRACKED = "its channels cannot be followed through a split, reshape or unknown operation"
MIXES = "it mixes places, and channels pass through it one by one"
FIXED_PARTS = "its channels are cut into unequal parts or at a fixed position"
SPREAD = "it is spread over several channels"
SHARED = "it shares weights with a layer of another kind"
TOGETHER = "its channels could only go all at once, since each is tied to the others"
MISLED = "its channels do not keep their positions (shuffle, reshape, mixing or an operation that is not known)"
_ORDER = (ATTENTION, INPUT, SHARED, FIXED_PARTS, UNTRACKED, SPREAD, MIXES, OUTPUT, PADDING)


def operation(name: str) -> str:
    """The reason where an operation is not known to treat channels one by one."""
    return f"its channels do not keep their positions through the operation {name}"


def statistics(name: str, module: nn.Module) -> str:
    """The reason where a norm takes statistics over channels."""
    return f"they pass through {name} ({type(module).__name__}), whose statistics would change"


class _Member(Protocol):
    module: str
    axis: str
    positions: tuple[tuple[int, ...], ...]


class _Group(Protocol):
    members: tuple[_Member, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


def structural_reason(model: nn.Module, members: Sequence[_Member], heard: Set[str]) -> str:
    """Why a group may not be pruned as far as its layers tell; "" where they allow it.

    Args:
        model: the network.
        members: the members of the group.
        heard: reasons from the way of its channels through the network.
    """
    if ATTENTION in heard:
        return ATTENTION
    layers = [m for m in members if ":" not in m.axis]
    parts = sorted(((m.module, axes.find(model, m.module)) for m in layers), key=lambda p: isinstance(p[1], Tensor))
    reason = next((reason for name, module in parts if (reason := _layer_reason(name, module))), "")
    if reason or heard:
        named = [reason, *sorted(heard - set(_ORDER)), *(known for known in _ORDER if known in heard)]
        return next(filter(None, named))
    if not any(member.axis == "in" for member in members):
        return OUTPUT
    alone = len(members[0].positions) == 1 and any(len(m.positions[0]) > 1 for m in members if m.axis == "out")
    return TOGETHER if alone else ""


def _layer_reason(name: str, module: nn.Module | Tensor) -> str:
    """Why the channels of one member may not be removed, or ""."""
    if isinstance(module, nn.MultiheadAttention):
        return ATTENTION
    if isinstance(module, nn.LayerNorm) and not axes.is_layer_norm(module):
        return statistics(name, module)
    if isinstance(module, Tensor):
        vector = sum(size > 1 for size in module.shape) == 1
        kind = "parameter" if isinstance(module, nn.Parameter) else "buffer"
        return "" if vector else f"{kind} {name} {list(module.shape)} has no axis known to be the channels"
    if not axes.is_boundary(module) and not axes.is_channelwise(module) and not axes.is_layer_norm(module):
        return f"they pass through {name} ({type(module).__name__}), which cannot be cut"
    return _weight_reason(name, module)


def _weight_reason(name: str, module: nn.Module) -> str:
    """Why the tensors of a cuttable layer forbid it, or ""."""
    if isinstance(module, axes.CONVOLUTIONS) and module.transposed and module.groups > 1:
        return f"{name} is a grouped transposed convolution"
    if isinstance(module, axes.INSTANCE_NORMS) and module.track_running_stats:
        return f"{name} is an InstanceNorm with running statistics"
    extra = {key for key, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}
    if extra or parametrize.is_parametrized(module):
        return f"the weights of {name} are reparametrised"
    return ""


def shared_parameters(model: nn.Module) -> list[list[tuple[str, str]]]:
    """For each parameter that several modules hold: (module, name there) of all of them."""
    holders: dict[int, list[tuple[str, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((name, key))
    return [sites for sites in holders.values() if len(sites) > 1]


def has_depthwise(model: nn.Module, members: Iterable[_Member]) -> bool:
    """Whether a depthwise convolution follows the channels."""
    return any(axes.is_depthwise(axes.find(model, member.module)) for member in members)


def has_layer_norm(model: nn.Module, members: Iterable[_Member]) -> bool:
    """Whether a norm takes its statistics over the channels."""
    return any(axes.is_layer_norm(axes.find(model, member.module)) for member in members)


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
