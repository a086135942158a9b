"""Masks in the place of removal, as the two-axis paper's companion code prunes: for comparison only.

A mask zeroes single channels of one layer's raw output and nothing else. The norm behind it still adds its shift, a
residual add still carries the other branch, and nothing gets faster. The multiply-adds are counted as if what is zero
everywhere had been removed. Every result made this way is labelled `removal="mask"`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.structure import axes
from lit_prune.structure.cost import Cost
from lit_prune.structure.groups import ChannelGraph, Group
from lit_prune.structure.ranking import ISOMORPHIC, Budget, Ranks, normalise, selected_groups
from lit_prune.structure.widths import Steps, global_widths, uniform_widths


@dataclass(frozen=True)
class MaskPlan:
    """Channels that stay in each masked layer.

    Attributes:
        kept: layer -> channels, ascending; layers that lose nothing are not named.
        macs: multiply-adds for one image, counted as if removed.
        dense_macs: without masks.
        channels: share of the channels of the layers that could be masked that stays.
        met: whether the budget is met.
    """

    kept: Mapping[str, tuple[int, ...]]
    macs: int
    dense_macs: int
    channels: float
    met: bool


def mask_channels(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy of the model in which the raw outputs of all other channels of the named layers are zero.

    The mask is a forward hook: masked kernels get no gradient, so fine-tuning does not bring them back.

    Args:
        model: any network; left as found.
        kept: Conv2d or Linear layer -> channels that stay.

    Raises:
        InputError: a channel that the layer does not have.
    """
    masked = copy.deepcopy(model)
    for name, channels in kept.items():
        layer = masked.get_submodule(name)
        width = axes.width(layer, "out")
        if not all(0 <= channel < width for channel in channels):
            raise InputError(f"kept[{name!r}]: channels must lie in 0..{width - 1}, got {list(channels)[:8]}")
        mask = _Mask(channels, width, axis=-1 if isinstance(layer, nn.Linear) else 1)
        layer.register_forward_hook(mask, prepend=True)
    return masked


class _Mask:
    """Forward hook that multiplies a layer's output with a mask."""

    def __init__(self, channels: Sequence[int], width: int, axis: int) -> None:
        self.axis = axis
        self.mask = torch.zeros(width)
        self.mask[list(channels)] = 1.0

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        shape = [1] * output.dim()
        shape[self.axis] = -1
        return output * self.mask.to(output).view(shape)


def plan_masks(graph: ChannelGraph, counted: Cost, ranks: Ranks, request: Budget) -> MaskPlan:
    """Which channels to mask: each layer by itself, one threshold (or one share) over all layers, under a budget.

    The layers are the producers of the groups that the request selects. A layer that reads a coupled group reads as
    many channels as at least one producer keeps.

    Args:
        graph: groups of the network.
        counted: `cost` of the network.
        ranks: layer -> scores [N].
        request: a budget of "macs" or "channels", shared out "global" or "uniform".

    Raises:
        InputError: another kind of budget or allocation, or nothing to mask.
    """
    if request.normalisation == ISOMORPHIC:
        raise InputError("normalisation='isomorphic': masks lie on single layers, which have no kind; use 'rank'")
    if request.kind not in ("macs", "channels") or request.allocation == "layerwise":
        raise InputError(
            f"budget={request.kind!r}, allocation={request.allocation!r}: masks take a budget of macs or channels, "
            "shared out global or uniform"
        )
    silent = [group for group in selected_groups(graph, request) if group.role in ("mid", "planes")]
    layers = [name for group in silent for name in group.producers if name in ranks]
    if not layers:
        raise InputError(f"nothing to mask: no layer of the selected groups has scores (only={request.only!r})")
    scores = [normalise(ranks[name].double().cpu().numpy(), request.normalisation) for name in layers]
    places = {name: _places(values) for name, values in zip(layers, scores, strict=True)}
    macs = _counter(graph, counted, places)
    sizes = np.array([len(values) for values in scores])
    price: Callable[[np.ndarray], int] = macs if request.kind == "macs" else lambda widths: int(widths.sum())
    target = request.share * price(sizes)
    choose = global_widths if request.allocation == "global" else uniform_widths
    widths = choose(Steps.build(scores, request.round_to, request.cap), price, target)
    kept = {
        name: tuple(np.flatnonzero(places[name] < width).tolist())
        for name, width in zip(layers, widths.tolist(), strict=True)
        if width < len(places[name])
    }
    return MaskPlan(kept, macs(widths), macs(sizes), float(widths.sum() / sizes.sum()), price(widths) <= target)


def _places(scores: np.ndarray) -> np.ndarray:
    """Place of each channel when sorted from the best; a tie goes to the lower index."""
    places = np.empty(len(scores), dtype=np.int64)
    places[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    return places


def _counter(graph: ChannelGraph, counted: Cost, places: Mapping[str, np.ndarray]) -> Callable[[np.ndarray], int]:
    """Widths of the masked layers -> multiply-adds of the network, as if removed."""
    groups = [group for group in graph.groups if any(name in places for name in group.producers)]
    masked = {(name, "out") for name in places}
    users = {group.name: [m for m in group.members if m.module in counted.layers] for group in groups}

    def macs(widths: np.ndarray) -> int:
        width = dict(zip(places, widths.tolist(), strict=True))
        shares = {(name, "out"): count / len(places[name]) for name, count in width.items()}
        for group in groups:
            read = _read_share(group, places, width)
            for member in users[group.name]:
                if (member.module, member.axis) not in masked:
                    axis = (member.module, member.axis)
                    part = group.size * len(member.positions[0]) / graph.widths[axis]
                    shares[axis] = shares.get(axis, 1.0) - part * (1 - read)
        total = 0.0
        for name, layer in counted.layers.items():
            total += layer.macs * shares.get((name, "out"), 1.0) * shares.get((name, "in"), 1.0)
        return round(total)

    return macs


def _read_share(group: Group, places: Mapping[str, np.ndarray], width: Mapping[str, int]) -> float:
    """Share of the group's units that at least one producer keeps; producers without a mask keep all."""
    kept = np.zeros(group.size, dtype=bool)
    for member in group.members:
        if member.axis == "out" and member.module in group.producers:
            if member.module not in places:
                return 1.0
            kept |= (places[member.module][np.array(member.positions)] < width[member.module]).any(1)
    return float(kept.mean())
