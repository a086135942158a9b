"""What the layers that are cut as a whole do to the labels of channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_prune.structure import axes, protection
from lit_prune.structure.labels import compact, varies

if TYPE_CHECKING:
    from lit_prune.structure.following import Follower

Rule = Callable[["Follower", str, nn.Module, tuple, Any], None]


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a layer, or None for one that is followed operation by operation."""
    if isinstance(module, nn.MultiheadAttention):
        return _attention
    if isinstance(module, axes.PaddedShortcut):
        return _shortcut
    if axes.is_boundary(module):
        return _boundary
    if isinstance(module, nn.GroupNorm):
        return _group_norm
    if axes.is_channelwise(module) and not axes.is_single_prelu(module):
        return _channelwise
    return _layer_norm if axes.is_layer_norm(module) or isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else None


def _rows(module: nn.Module, labels: Tensor) -> Tensor:
    """The labels with the channels of the layer last."""
    return labels.movedim(axes.channel_dim(module, labels), -1)


def _read(follower: Follower, module: nn.Module, values: Any, own: Tensor) -> bool:
    """Ties what a layer reads to its own labels; False where channels lie along another dimension than the layer's."""
    labels = follower.of(values)
    if labels is None:
        follower.labels.keep([own], protection.UNTRACKED)
        return True
    rows = _rows(module, labels)
    if not varies(rows, rows.dim() - 1) and any(varies(rows, dim) for dim in range(rows.dim() - 1)):
        follower.labels.keep([own], protection.MIXES)
        return False
    for place, fixed in enumerate(follower.fixed):
        if bool((compact(rows) == fixed).all()):
            follower.labels.keep([own], follower.labels.reasons[int(follower.fixed[place])])
            return True
    follower.labels.tie(rows, own.expand(rows.shape))
    return True


def _write(follower: Follower, module: nn.Module, output: Tensor, own: Tensor) -> None:
    dim = axes.channel_dim(module, output)
    shape = [1] * output.dim()
    shape[dim] = len(own)
    follower.put(output, own.view(shape).expand(output.shape))


def _boundary(follower: Follower, name: str, module: nn.Module, args: tuple, output: Any) -> None:
    """A convolution or linear layer: its inputs end here, its outputs begin."""
    own, out = (follower.labels.axis(name, axis, axes.width(module, axis)) for axis in ("in", "out"))
    if getattr(module, "groups", 1) > 1:
        _tie_groups(follower, module, own, out)
    if _read(follower, module, args[0], own):
        _write(follower, module, output, out)
        return
    follower.labels.keep([out], protection.MIXES)  # it mixes places; channels pass it one by one
    _pass(follower, module, args[0], output)


def _pass(follower: Follower, module: nn.Module, values: Tensor, output: Tensor) -> None:
    """Channels that lie along another dimension pass one by one, unless the layer mixes that dimension too."""
    labels = follower.of(values)
    dim = axes.channel_dim(module, labels)
    kernel = getattr(module, "kernel_size", ())
    mixed = [labels.dim() - len(kernel) + place for place, size in enumerate(kernel) if size > 1] if kernel else []
    if any(varies(labels, d) for d in mixed):
        follower.labels.keep([labels], protection.operation("of a convolution along them"))
        follower.put(output, follower.fixed[2].expand(output.shape))
        return
    for d in range(labels.dim()):
        if d == dim or labels.shape[d] != output.shape[d]:
            labels = labels.narrow(d, 0, 1)
    follower.put(output, labels.expand(output.shape))


def _tie_groups(follower: Follower, module: nn.Module, own: Tensor, out: Tensor) -> None:
    """Whole groups go, or the same places of every group, see `axes.goes_by_group`."""
    inner, outer = (labels.view(module.groups, -1) for labels in (own, out))
    if axes.goes_by_group(module):
        for labels in (inner, outer):
            follower.labels.tie(labels[:, :1].expand(labels.shape), labels)
        follower.labels.tie(inner[:, 0], outer[:, 0])
    else:
        for labels in (inner, outer):
            follower.labels.tie(labels[:1].expand(labels.shape), labels)


def _channelwise(follower: Follower, name: str, module: nn.Module, args: tuple, output: Any) -> None:
    """A norm by channel, a depthwise convolution, a PReLU: channels pass one by one."""
    own = follower.labels.axis(name, "out", axes.width(module, "out"))
    if _read(follower, module, args[0], own):
        _write(follower, module, output, own)
    elif axes.is_layer_norm(module):
        follower.labels.keep([follower.of(args[0])], protection.statistics(name, module))
        follower.put(output, follower.of(args[0]))
    else:
        _pass(follower, module, args[0], output)


def _group_norm(follower: Follower, name: str, module: nn.GroupNorm, args: tuple, output: Any) -> None:
    """Whole groups go: what is left of a group would have other statistics."""
    own = follower.labels.axis(name, "out", module.num_channels)
    rows = own.view(module.num_groups, -1)
    follower.labels.tie(rows[:, :1].expand(rows.shape), rows)
    if module.num_groups == 1:
        follower.labels.keep([own], protection.statistics(name, module))
    _read(follower, module, args[0], own)
    _write(follower, module, output, own)


def _layer_norm(follower: Follower, name: str, module: nn.LayerNorm, args: tuple, output: Any) -> None:
    """Channels pass one by one, though the statistics are those of the ones that are left (role "width")."""
    if axes.is_layer_norm(module):
        _channelwise(follower, name, module, args, output)
    elif (labels := follower.of(args[0])) is not None:
        follower.labels.keep([labels], protection.statistics(name, module))
        follower.put(output, labels)


def _attention(follower: Follower, name: str, module: nn.MultiheadAttention, args: tuple, output: Any) -> None:
    """Queries, keys and values are read alike and the projection writes; its heads are found by `heads`."""
    if module.in_proj_weight is not None:
        parts = ((f"{name}.in_proj_weight", "dim:1"), (f"{name}.out_proj", "out"), (name, "attribute:embed_dim"))
        own, out, stated = (follower.labels.axis(*part, module.embed_dim) for part in parts)
        follower.labels.tie(own, out)
        follower.labels.tie(own, stated)
        for tensor in args[:3]:
            _read(follower, module, tensor, own)
        _write(follower, module, output[0], out)
        return
    found = [labels for t in tree_leaves(args) if isinstance(t, Tensor) and (labels := follower.of(t)) is not None]
    follower.labels.keep(found, protection.ATTENTION)
    for tensor in tree_leaves(output):
        if isinstance(tensor, Tensor):
            follower.put(tensor, follower.fixed[2].expand(tensor.shape))


def _shortcut(follower: Follower, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
    """A padded shortcut: its table ties the two sides, so that each is cut by itself."""
    own, out = (follower.labels.axis(name, axis, axes.width(module, axis)) for axis in ("in", "out"))
    _read(follower, module, args[0], own)
    _write(follower, module, output, out)
