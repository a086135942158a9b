"""Why a group of channels may not be pruned, and whether it is trunk or inside of a block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lit_prune.structure import axes, reasons
from lit_prune.structure.layers import layer_type

if TYPE_CHECKING:  # which imports this
    from lit_prune.structure.coupling import Group, Member


def structural_reason(model: nn.Module, members: Sequence[Member], heard: Set[str]) -> str:
    """Why a group may not be pruned as far as its layers tell; "" where they allow it.

    Args:
        model: the network.
        members: the members of the group.
        heard: reasons from the way of its channels through the network.
    """
    if reasons.ATTENTION in heard:
        return reasons.ATTENTION
    layers = [m for m in members if ":" not in m.axis]
    parts = sorted(((m.module, axes.find(model, m.module)) for m in layers), key=lambda p: isinstance(p[1], Tensor))
    reason = next((reason for name, module in parts if (reason := _layer_reason(name, module))), "")
    if reason or heard:
        named = [reason, *sorted(heard - set(reasons.ORDER)), *(known for known in reasons.ORDER if known in heard)]
        return next(filter(None, named))
    if not any(member.axis == "in" for member in members):
        return reasons.OUTPUT
    alone = len(members[0].positions) == 1 and any(len(m.positions[0]) > 1 for m in members if m.axis == "out")
    return reasons.TOGETHER if alone else ""


def _layer_reason(name: str, module: nn.Module | Tensor) -> str:
    """Why the channels of one member may not be removed, or ""."""
    if isinstance(module, Tensor):
        vector = sum(size > 1 for size in module.shape) == 1
        kind = "parameter" if isinstance(module, nn.Parameter) else "buffer"
        return "" if vector else f"{kind} {name} {list(module.shape)} has no axis known to be the channels"
    layer = layer_type(module)
    if layer is None:
        return f"they pass through {name} ({type(module).__name__}), which cannot be cut"
    extra = {key for key, _ in module.named_parameters(recurse=False)} - set(layer.parameters)
    reparametrised = layer.sort != "closed" and (extra or parametrize.is_parametrized(module))
    return layer.obstacle(module, name) or (
        f"the weights of {name} are reparametrised{TAKE_OFF}" if reparametrised else ""
    )


TAKE_OFF = " (weight norm, a mask: remove_parametrizations, remove_weight_norm or prune.remove first)"


def shared_parameters(model: nn.Module) -> list[list[tuple[str, str]]]:
    """For each parameter that several modules hold: (module, name there) of all of them."""
    holders: dict[int, list[tuple[str, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((name, key))
    return [sites for sites in holders.values() if len(sites) > 1]


def has_depthwise(model: nn.Module, members: Iterable[Member]) -> bool:
    """Whether a depthwise convolution follows the channels."""
    return any(axes.is_depthwise(axes.find(model, member.module)) for member in members)


def has_layer_norm(model: nn.Module, members: Iterable[Member]) -> bool:
    """Whether a norm takes its statistics over the channels."""
    return any(axes.is_layer_norm(axes.find(model, member.module)) for member in members)


def is_trunk(model: nn.Module, group: Group, joined: set[str]) -> bool:
    """Whether the channels pass through a padded shortcut or are read by a block and by its projection shortcut.

    `joined` are the layers whose outputs an addition joins.
    """
    layers = (layer_type(axes.find(model, member.module)) for member in group.members)
    if any(layer is not None and layer.is_trunk for layer in layers):
        return True
    return len(group.producers) == 1 and 0 < sum(name in joined for name in group.consumers) < len(group.consumers)


def is_projection(model: nn.Module, group: Group, read: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether the channels leave an inverted residual: they read its depthwise width, and no gate leads back to it.

    Args:
        model: the network.
        group: the group.
        read: layer -> producers of the depthwise width inside a block that the layer reads.
    """
    sources = [read[name] for name in group.producers if name in read]
    gate = any(name in producers for producers in sources for name in group.consumers)
    return bool(sources) and not gate and not has_depthwise(model, group.members)
