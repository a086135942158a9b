"""Seconds of a network's layers as arithmetic on the widths of its groups, from times of each shape at some widths."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_prune.progress import watched
from lit_prune.running import removing, undisturbed
from lit_prune.structure import axes
from lit_prune.structure.cost_model import layer_rows
from lit_prune.structure.groups import ChannelGraph
from lit_prune.structure.layers import layer_type
from lit_prune.structure.opened import opened
from lit_prune.structure.runtimes import Run, Runtime
from lit_prune.timing import Best, best_times

LEVELS = 8  # widths of an axis at which a layer is timed
BLOCK = 8  # channels that kernels take at once: a width costs what the next multiple costs
SECONDS = 0.1  # of timing for a row of widths


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer, for a row of widths of its output and of its input.

    Attributes:
        out: widths of the output, ascending, int64 [L].
        read: widths of the input, ascending, int64 [M]; of a depthwise layer, whose two widths are one, a single one.
        seconds: float64 [L, M], never falling in either direction: a wider layer can always do a narrower one's work.
        spread: see `Best`, median over the widths.
    """

    out: np.ndarray
    read: np.ndarray
    seconds: np.ndarray
    spread: float


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of all layers of a network, interpolated between the widths that were timed.

    A width is rounded up to a multiple of `BLOCK` first (of the narrowest level, where that is less): kernels work on
    blocks. Below the narrowest level a layer costs what it costs there.

    Attributes:
        times: of the layers, N in all; layers of one shape share theirs.
        rows: of their output and input axes, int64 [2, N, G+1], see `CostModel`.
        levels: of both axes, padded by the last, int64 [2, N, L].
        seconds: float64 [N, L, L], padded likewise.
    """

    times: tuple[LayerTimes, ...]
    rows: np.ndarray
    levels: np.ndarray
    seconds: np.ndarray

    @classmethod
    def build(cls, layers: Sequence[tuple[np.ndarray, np.ndarray, LayerTimes]]) -> "LatencyTable":
        """From the rows of the output and the input of each layer, and its times."""
        most = max(max(times.seconds.shape) for _, _, times in layers)
        ends = lambda values: most - len(values)  # noqa: E731
        levels = [[np.pad(axis, (0, ends(axis)), "edge") for axis in (times.out, times.read)] for _, _, times in layers]
        seconds = [
            np.pad(times.seconds, ((0, ends(times.out)), (0, ends(times.read))), "edge") for _, _, times in layers
        ]
        rows = np.array([[out, read] for out, read, _ in layers]).swapaxes(0, 1)
        times = tuple(found for _, _, found in layers)
        return cls(times, rows, np.array(levels).swapaxes(0, 1), np.array(seconds))

    @property
    def spread(self) -> float:
        """Median over the layers, see `Best`."""
        return float(np.median([found.spread for found in self.times]))

    def __call__(self, widths: np.ndarray) -> float:
        """Of the network whose groups have these widths, int64 [G]."""
        wanted = (self.rows @ np.append(widths, 1))[..., None]  # [2, N, 1]
        there = (wanted > 0).all((0, 2))  # others go with their block
        block = np.minimum(BLOCK, self.levels[..., :1])
        wanted = np.clip(-(-wanted // block) * block, self.levels[..., :1], self.levels[..., -1:])
        upper = np.clip((self.levels < wanted).sum(-1), 1, self.levels.shape[-1] - 1)
        layer = np.arange(self.rows.shape[1])
        below, above = (np.take_along_axis(self.levels, k[..., None], -1) for k in (upper - 1, upper))
        share = ((wanted - below) / np.maximum(above - below, 1))[..., 0]
        i, j = upper
        corners = [(i - 1, j - 1), (i - 1, j), (i, j - 1), (i, j)]
        low, high, deep, far = (self.seconds[layer, a, b] for a, b in corners)
        u, v = share
        return float(((1 - u) * ((1 - v) * low + v * high) + u * ((1 - v) * deep + v * far))[there].sum())


def levels_of(size: int) -> np.ndarray:
    """Widths of an axis at which a layer is timed: about `LEVELS`, in multiples of `BLOCK` where it has so many.

    >>> levels_of(16), levels_of(200)
    (array([ 2,  4,  6,  8, 10, 12, 14, 16]), array([ 32,  64,  96, 128, 160, 192, 200]))
    """
    step = -(-size // LEVELS)
    step = step if step <= BLOCK else -(-step // BLOCK) * BLOCK
    return np.append(np.arange(step, size, step), size)


def time_layers(model: nn.Module, graph: ChannelGraph, images: Tensor, runtime: Runtime) -> LatencyTable | None:
    """Times every shape of layer once, alone, at the widths that its groups may take; None where there is none.

    Args:
        model: the network; left as found.
        graph: its groups.
        images: what it is called with, the batch that counts.
        runtime: what runs the layers; one that it cannot run alone is left out.
    """
    rows = layer_rows(model, graph, images)
    known: dict[tuple, LayerTimes | None] = {}
    found = []
    with undisturbed(model), torch.inference_mode(), opened(model):
        for call in watched(_calls(model, images, rows), "shapes of layers timed"):
            out, read = rows[call.name]
            varies = bool(out[:-1].any()), bool(read[:-1].any())
            key = tuple((type(module), module.extra_repr()) for module in call.modules), call.shape, varies
            if key not in known:
                known[key] = _time_call(call, images, varies, runtime)
            if (times := known[key]) is not None:
                found.append((out, read, times))
    return LatencyTable.build(found) if found else None


@dataclass
class Call:
    """One call of a layer, and the norm and activations that its output passes next.

    Attributes:
        name: of the layer.
        modules: the layer, then those.
        shape: of what it reads.
        output: of the last of them.
    """

    name: str
    modules: list[Any]
    shape: torch.Size
    output: Tensor | None


def _calls(model: nn.Module, images: Tensor, names: Any) -> list[Call]:
    """All calls of these layers in one pass, in order."""
    calls: list[Call] = []

    def note(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if name in names:
            calls.append(Call(name, [module], args[0].shape, output))
        elif calls and args and args[0] is calls[-1].output and _passes(module, args[0], output):
            calls[-1].modules.append(module)
            calls[-1].output = output
        elif calls:
            calls[-1].output = None  # others have come between

    handles = [
        module.register_forward_hook(partial(note, name))
        for name, module in model.named_modules()
        if name in names or not next(module.children(), None)
    ]
    with removing(handles):
        model(images)
    for call in calls:
        call.output = None
    return calls


def _passes(module: nn.Module, given: Any, output: Any) -> bool:
    """Whether channels pass a module one by one, at any number of them."""
    plain = isinstance(module, axes.BATCH_NORMS) or next(module.parameters(), None) is None
    return plain and isinstance(output, Tensor) and output.shape == given.shape


def _time_call(call: Call, images: Tensor, varies: tuple[bool, bool], runtime: Runtime) -> LayerTimes | None:
    """A layer at all pairs of its levels; None where it cannot be run alone."""
    module, values = call.modules[0], images.new_zeros(call.shape)
    depthwise = axes.is_depthwise(module)
    out, read = (
        levels_of(axes.width(module, axis)) if vary else np.array([axes.width(module, axis)])
        for axis, vary in zip(("out", "in"), varies, strict=True)
    )
    read = read[-1:] if depthwise else read
    columns: list[list[Best]] = []
    for width in read:
        runs = [_narrowed(call.modules, values, int(n), int(n) if depthwise else int(width), runtime) for n in out]
        if not (there := [run for run in runs if run is not None]):
            return None
        columns.append(best_times(there, SECONDS))
    seconds = np.array([[best.seconds for best in column] for column in columns]).T / runtime.copies
    for axis in (0, 1):
        seconds = np.flip(np.minimum.accumulate(np.flip(seconds, axis), axis), axis)
    return LayerTimes(out, read, seconds, float(np.median([best.spread for column in columns for best in column])))


def _narrowed(modules: Sequence[Any], values: Tensor, out: int, read: int, runtime: Runtime) -> Run | None:
    """A pass of a layer with so many outputs and inputs, and of what follows it."""
    layer, *after = copy.deepcopy(modules)
    kind = layer_type(layer)
    assert kind is not None, "rows are of layers"
    shape = list(values.shape)
    shape[kind.channel_dim(layer, values)] = read
    given = values.flatten()[: math.prod(shape)].view(shape)  # all share the one map of zeros
    width = axes.width(layer, "out")
    for axis, wanted in (("out", out),) if axes.is_depthwise(layer) else (("out", out), ("in", read)):
        kind.cut(layer, axis, range(wanted, axes.width(layer, axis)))
    for module in after:
        if (norm := layer_type(module)) is not None:
            norm.cut(module, "out", range(out, width))
    return runtime.layers([layer, *after], given)
