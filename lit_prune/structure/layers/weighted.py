"""Convolutions and linear layers: where channels end and begin, and depthwise ones, which they pass one by one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from lit_prune.running import CONVOLUTIONS
from lit_prune.structure.layers.base import LayerCost, LayerType, Sort, drop, register_layer

if TYPE_CHECKING:
    from lit_prune.structure.following import Follower

_SPATIAL = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def goes_by_group(module: Any) -> bool:
    """Whether a grouped convolution loses whole groups (where they are many and narrow), or the same places of each."""
    return module.groups >= module.in_channels // module.groups


@register_layer("linear")
class Linear(LayerType):
    """Linear layers."""

    modules = (nn.Linear,)
    sort = "mixing"
    stated: ClassVar = {"out": "out_features", "in": "in_features"}
    tensors: ClassVar = {"out": ("weight", "bias"), "in": ("weight",)}
    counts = True

    def stored(self, module: Any, axis: str) -> int:
        """Of the weight, [out, in]."""
        return module.weight.shape[0 if axis == "out" else 1]

    def channel_dim(self, module: Any, values: Tensor) -> int:
        """The last."""
        return values.dim() - 1

    def count(self, module: Any, args: tuple, kwargs: dict, output: Any) -> LayerCost:
        """`positions · in · out`."""
        params = sum(parameter.numel() for parameter in module.parameters())
        positions = output.numel() // module.out_features
        macs = positions * module.weight.numel()
        return LayerCost(macs, params, module.out_features, module.in_features, positions, "linear")


@register_layer("convolution")
class Convolution(LayerType):
    """Convolutions of one group, transposed ones too."""

    modules = CONVOLUTIONS
    sort: ClassVar[Sort] = "mixing"
    stated: ClassVar = {"out": "out_channels", "in": "in_channels"}
    counts = True

    def stored(self, module: Any, axis: str) -> int:
        """Of the weight: [out, in / groups, ...], transposed [in, out / groups, ...]."""
        if (axis == "out") != module.transposed:
            return module.weight.shape[0]
        return module.weight.shape[1] * module.groups

    def channel_dim(self, module: Any, values: Tensor) -> int:
        """The second; the first of a map without a batch."""
        dims = next((dims for kind, dims in _SPATIAL.items() if isinstance(module, kind)), None)
        return 0 if dims is not None and values.dim() == dims + 1 else 1

    def cut(self, module: Any, axis: str, positions: Sequence[int]) -> None:
        """Kernels, or what each reads."""
        if axis == "out":
            drop(module, ("weight",), positions, 1 if module.transposed else 0)
            drop(module, ("bias",), positions)
            module.out_channels -= len(positions)
        else:
            drop(module, ("weight",), positions, 0 if module.transposed else 1)
            module.in_channels -= len(positions)

    def obstacle(self, module: Any, name: str) -> str:
        """A transposed one in groups."""
        return f"{name} is a grouped transposed convolution" if module.transposed and module.groups > 1 else ""

    def count(self, module: Any, args: tuple, kwargs: dict, output: Any) -> LayerCost:
        """`positions · kernel · in / groups · out`; positions of the input where it is transposed."""
        params = sum(parameter.numel() for parameter in module.parameters())
        values, channels = (args[0], module.in_channels) if module.transposed else (output, module.out_channels)
        positions = values.numel() // channels  # frames folded into the batch count too
        kind = "depthwise" if self.sort == "channelwise" else "conv"
        macs = positions * module.weight.numel()
        return LayerCost(macs, params, module.out_channels, module.in_channels, positions, kind)


@register_layer("grouped convolution")
class GroupedConvolution(Convolution):
    """Convolutions in groups: whole groups go, or the same places of every group (`goes_by_group`)."""

    def fits(self, module: nn.Module) -> bool:
        """Several groups."""
        return isinstance(module, CONVOLUTIONS) and module.groups > 1

    def cut(self, module: Any, axis: str, positions: Sequence[int]) -> None:
        """Kernels; of the input whole groups, or the same columns of every kernel."""
        if axis == "out":
            drop(module, ("weight", "bias"), positions)
            module.out_channels -= len(positions)
            return
        width = module.in_channels // module.groups
        if goes_by_group(module):
            module.groups -= len(positions) // width
        else:
            drop(module, ("weight",), sorted({place % width for place in positions}), 1)
        module.in_channels -= len(positions)

    def follow(self, follower: "Follower", name: str, module: Any, args: tuple, output: Any) -> None:
        """Ties what goes together."""
        own, out = (follower.labels.axis(name, axis, self.width(module, axis)) for axis in ("in", "out"))
        inner, outer = (labels.view(module.groups, -1) for labels in (own, out))
        if goes_by_group(module):
            for labels in (inner, outer):
                follower.labels.tie(labels[:, :1].expand(labels.shape), labels)
            follower.labels.tie(inner[:, 0], outer[:, 0])
        else:
            for labels in (inner, outer):
                follower.labels.tie(labels[:1].expand(labels.shape), labels)
        super().follow(follower, name, module, args, output)


@register_layer("depthwise convolution")
class Depthwise(Convolution):
    """Convolutions with one input and one output channel in each of several groups."""

    sort = "channelwise"

    def fits(self, module: nn.Module) -> bool:
        """As many groups as channels."""
        return isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.out_channels == module.in_channels

    def stored(self, module: Any, axis: str) -> int:
        """Of the weight, [channels, 1, ...]."""
        return module.weight.shape[0]

    def cut(self, module: Any, axis: str, positions: Sequence[int]) -> None:
        """Kernels and groups."""
        drop(module, ("weight", "bias"), positions)
        module.in_channels = module.out_channels = module.groups = module.groups - len(positions)
