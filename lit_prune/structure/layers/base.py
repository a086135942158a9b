"""What a type of layer says of itself, and how it is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from lit_prune.registry import Registry
from lit_prune.structure import reasons
from lit_prune.structure.labels import compact, varies
from lit_prune.structure.tracing import without

if TYPE_CHECKING:
    from lit_prune.structure.following import Follower

Sort = Literal["mixing", "channelwise", "statistics", "closed"]


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer for one image.

    Attributes:
        macs: multiply-adds, over all calls of the layer.
        params: parameters that the layer holds itself.
        out_channels: width of the output (0 for an attention product without a layer).
        in_channels: width of the input (0 likewise).
        positions: positions at which the kernel is applied: pixels, tokens; over all calls.
        kind: "conv", "depthwise", "linear" or "attention".
    """

    macs: int
    params: int
    out_channels: int
    in_channels: int
    positions: int
    kind: str


class LayerType:
    """All that is known of a type of layer whose channels may be cut.

    Attributes:
        modules: classes of the modules that are of the type; `fits` may say more.
        sort: "mixing" where channels end and begin (axes "in" and "out"); "channelwise" where they pass one by one
            (axis "out"); "statistics" likewise, but for statistics over all of them (role "width"); "closed" where they
            cannot be cut, and `obstacle` says why.
        stated: axis -> attribute that states its number of channels; where it is no attribute, `width` tells.
        tensors: axis -> tensors that lose positions with it: rows along "out", columns along "in"; else see `cut`.
        parameters: names of its parameters; one that has others is left alone.
        bilinear: those of them that lie along both axes of a mixing layer, [out, in, ...]; the others along "out".
        counts: whether `count` tells its cost; else the products inside it are counted.
        is_trunk: whether it is found on the way around residual blocks alone.
    """

    modules: ClassVar[tuple[type[nn.Module], ...]] = ()
    sort: ClassVar[Sort] = "channelwise"
    stated: ClassVar[Mapping[str, str]] = {}
    tensors: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")
    bilinear: ClassVar[tuple[str, ...]] = ("weight",)
    counts: ClassVar[bool] = False
    is_trunk: ClassVar[bool] = False

    def fits(self, module: nn.Module) -> bool:
        """Whether a module is of the type."""
        return isinstance(module, self.modules)

    def width(self, module: Any, axis: str) -> int:
        """Number of channels that the attributes of a layer state."""
        return getattr(module, self.stated.get(axis, self.stated["out"]))

    def stored(self, module: Any, axis: str) -> int:
        """Number of channels that its tensors have, -1 where they disagree."""
        return self.width(module, axis)

    def channel_dim(self, module: Any, values: Tensor) -> int:
        """Dimension of its inputs and outputs along which the channels lie."""
        return 1

    def cut(self, module: Any, axis: str, positions: Sequence[int]) -> None:
        """Removes positions of one axis, in place: tensors (`drop`) and attributes."""
        drop(module, self.tensors[axis], positions, 0 if axis == "out" else 1)
        if axis in self.stated:
            setattr(module, self.stated[axis], getattr(module, self.stated[axis]) - len(positions))

    def obstacle(self, module: Any, name: str) -> str:
        """Why this one may not be cut, or ""."""
        return ""

    def count(self, module: Any, args: tuple, kwargs: dict, output: Any) -> LayerCost:
        """Its cost in one call on one sample."""
        raise NotImplementedError

    def follow(self, follower: Follower, name: str, module: Any, args: tuple, output: Any) -> None:
        """Says what happens to the labels of channels in one call."""
        out = follower.labels.axis(name, "out", self.width(module, "out"))
        if self.sort == "mixing":
            own = follower.labels.axis(name, "in", self.width(module, "in"))
            passing = self.read(follower, module, args[0], own)
            if passing is not None:  # it mixes places; channels pass it one by one
                follower.labels.keep([out], reasons.MIXES)
        else:
            passing = self.read(follower, module, args[0], out)
        if passing is None:
            self.write(follower, module, output, out)
        elif self.sort == "statistics":
            follower.labels.keep([passing], reasons.statistics(name, module))
            follower.put(output, passing)
        else:
            self.let_pass(follower, module, passing, output)

    def read(self, follower: Follower, module: Any, values: Tensor, own: Tensor) -> Tensor | None:
        """Ties what a layer reads to its own labels; the labels instead, where channels lie along another dimension."""
        labels = follower.of(values)
        if labels is None:
            follower.labels.keep([own], reasons.UNTRACKED)
            return None
        rows = labels.movedim(self.channel_dim(module, labels), -1)
        if not varies(rows, rows.dim() - 1) and any(varies(rows, dim) for dim in range(rows.dim() - 1)):
            follower.labels.keep([own], reasons.MIXES)
            return labels
        for place, fixed in enumerate(follower.fixed):
            if bool((compact(rows) == fixed).all()):
                follower.labels.keep([own], follower.labels.reasons[int(follower.fixed[place])])
                return None
        follower.labels.tie(rows, own.expand(rows.shape))
        return None

    def write(self, follower: Follower, module: Any, output: Tensor, own: Tensor) -> None:
        """Gives an output the layer's labels."""
        shape = [1] * output.dim()
        shape[self.channel_dim(module, output)] = len(own)
        follower.put(output, own.view(shape).expand(output.shape))

    def let_pass(self, follower: Follower, module: Any, labels: Tensor, output: Tensor) -> None:
        """Channels that lie along another dimension pass one by one, unless the layer mixes that dimension too."""
        dim = self.channel_dim(module, labels)
        kernel = getattr(module, "kernel_size", ())
        mixed = [labels.dim() - len(kernel) + place for place, size in enumerate(kernel) if size > 1] if kernel else []
        if any(varies(labels, d) for d in mixed):
            follower.labels.keep([labels], reasons.operation("of a convolution along them"))
            follower.put(output, follower.fixed[2].expand(output.shape))
            return
        for d in range(labels.dim()):
            if d == dim or labels.shape[d] != output.shape[d]:
                labels = labels.narrow(d, 0, 1)
        follower.put(output, labels.expand(output.shape))


LAYERS: Registry[LayerType] = Registry("layer")


def register_layer(name: str) -> Callable[[type[LayerType]], type[LayerType]]:
    """Class decorator: modules may be of this type; it is asked before those registered earlier."""

    def register(cls: type[LayerType]) -> type[LayerType]:
        LAYERS.add(name, cls(), cls)
        return cls

    return register


def layer_type(module: object) -> LayerType | None:
    """The type of a module, or None for one that is followed operation by operation.

    >>> layer_type(nn.Linear(2, 3)).width(nn.Linear(2, 3), "out")
    3
    """
    if not isinstance(module, nn.Module):
        return None
    return next((kind for kind in LAYERS.latest_first() if kind.fits(module)), None)


def drop(layer: nn.Module, keys: Sequence[str], positions: Sequence[int], dim: int = 0) -> None:
    """Takes positions out of the tensors of a layer, where it has them."""
    lost = np.array(positions, dtype=np.int64)  # a long list is read slowly, and once for all tensors
    for key in keys:
        if getattr(layer, key, None) is not None:
            setattr(layer, key, without(getattr(layer, key), lost, dim))
