"""Norms and what else has a value for each channel."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lit_prune.structure import reasons
from lit_prune.structure.layers.base import LayerType, register_layer

if TYPE_CHECKING:
    from lit_prune.structure.following import Follower

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
INSTANCE_NORMS = (nn.modules.instancenorm._InstanceNorm,)
FROZEN = frozenset({"weight", "bias", "running_mean", "running_var"})  # buffers of a norm that does not train
_TENSORS = {"out": ("weight", "bias", "running_mean", "running_var")}


@register_layer("batch norm")
class BatchNorm(LayerType):
    """BatchNorm and InstanceNorm."""

    modules = (*BATCH_NORMS, *INSTANCE_NORMS)
    stated, tensors = {"out": "num_features"}, _TENSORS

    def stored(self, module: Any, axis: str) -> int:
        """Of scale and statistics, those that it has."""
        widths = {len(tensor) for tensor in (module.weight, module.running_mean) if tensor is not None}
        return (widths or {module.num_features}).pop() if len(widths) <= 1 else -1

    def obstacle(self, module: Any, name: str) -> str:
        """An InstanceNorm's running statistics."""
        running = isinstance(module, INSTANCE_NORMS) and module.track_running_stats
        return f"{name} is an InstanceNorm with running statistics" if running else ""


@register_layer("frozen batch norm")
class FrozenBatchNorm(LayerType):
    """BatchNorms whose affine map and statistics are all buffers, as in detection backbones."""

    tensors = _TENSORS

    def fits(self, module: nn.Module) -> bool:
        """Told by its buffers."""
        if isinstance(module, BATCH_NORMS) or any(p is not None for p in module._parameters.values()):
            return False
        buffers = module._buffers
        return buffers.keys() >= FROZEN and all(t is not None and t.dim() == 1 for t in map(buffers.get, FROZEN))

    def width(self, module: Any, axis: str) -> int:
        """Of the scale."""
        return len(module.weight)

    def stored(self, module: Any, axis: str) -> int:
        """Of all its buffers."""
        widths = {len(module._buffers[key]) for key in FROZEN}
        return widths.pop() if len(widths) == 1 else -1

    def cut(self, module: Any, axis: str, positions: Sequence[int]) -> None:
        """Its buffers."""
        super().cut(module, axis, positions)
        if hasattr(module, "num_features"):
            module.num_features -= len(positions)


@register_layer("group norm")
class GroupNorm(LayerType):
    """GroupNorm: whole groups go, since what is left of one would have other statistics."""

    modules = (nn.GroupNorm,)
    stated, tensors = {"out": "num_channels"}, _TENSORS

    def cut(self, module: Any, axis: str, positions: Sequence[int]) -> None:
        """Whole groups."""
        width = module.num_channels // module.num_groups
        super().cut(module, axis, positions)
        module.num_groups = module.num_channels // width

    def follow(self, follower: "Follower", name: str, module: Any, args: tuple, output: Any) -> None:
        """Ties the channels of each group."""
        own = follower.labels.axis(name, "out", module.num_channels)
        rows = own.view(module.num_groups, -1)
        follower.labels.tie(rows[:, :1].expand(rows.shape), rows)
        if module.num_groups == 1:
            follower.labels.keep([own], reasons.statistics(name, module))
        self.read(follower, module, args[0], own)
        self.write(follower, module, output, own)


@register_layer("layer norm over several dimensions")
class WideLayerNorm(LayerType):
    """LayerNorms whose statistics and scales go over positions too: closed."""

    modules = (nn.LayerNorm, nn.RMSNorm)
    sort = "closed"

    def obstacle(self, module: Any, name: str) -> str:
        """Its statistics."""
        return reasons.statistics(name, module)

    def follow(self, follower: "Follower", name: str, module: Any, args: tuple, output: Any) -> None:
        """Keeps the channels."""
        if (labels := follower.of(args[0])) is not None:
            follower.labels.keep([labels], reasons.statistics(name, module))
            follower.put(output, labels)


@register_layer("layer norm")
class LayerNorm(LayerType):
    """LayerNorm and RMSNorm: statistics over all channels and a scale for each."""

    sort, tensors = "statistics", _TENSORS

    def fits(self, module: nn.Module) -> bool:
        """Over one dimension."""
        return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) == 1

    def width(self, module: Any, axis: str) -> int:
        """Its shape."""
        return module.normalized_shape[0]

    def channel_dim(self, module: Any, values: Tensor) -> int:
        """The last; the second for the LayerNorm2d of torchvision and timm."""
        return 1 if "2d" in type(module).__name__ else values.dim() - 1

    def cut(self, module: Any, axis: str, positions: Sequence[int]) -> None:
        """Scales, shifts and its shape."""
        super().cut(module, axis, positions)
        module.normalized_shape = (module.normalized_shape[0] - len(positions),)


@register_layer("response norm")
class ResponseNorm(LayerType):
    """The global response norm of ConvNeXt v2 (timm)."""

    sort, tensors = "statistics", _TENSORS

    def fits(self, module: nn.Module) -> bool:
        """Told by its name, since timm may be absent."""
        return type(module).__name__ == "GlobalResponseNorm"

    def width(self, module: Any, axis: str) -> int:
        """Of the scale."""
        return len(module.weight)

    def channel_dim(self, module: Any, values: Tensor) -> int:
        """As it says."""
        return module.channel_dim % values.dim()


@register_layer("prelu")
class PReLU(LayerType):
    """PReLU with a slope for each channel; with one for all it is an activation like any other."""

    stated, tensors = {"out": "num_parameters"}, {"out": ("weight",)}

    def fits(self, module: nn.Module) -> bool:
        """Several slopes."""
        return isinstance(module, nn.PReLU) and module.num_parameters > 1
