"""Which modules of a network are solved as a whole, and which of their outputs stay."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lit_prune.measurement.layers import removing
from lit_prune.structure import ChannelGraph, Plan, axes
from lit_prune.structure.following import Follower
from lit_prune.structure.labels import compact
from lit_prune.structure.tracing import one_sample, run, traceable

MOST_LAYERS = 16
"""Layers in one segment."""


@dataclass(frozen=True)
class Segment:
    """A module that hands one tensor in and one out, and runs once.

    Attributes:
        name: qualified name; "" is the network.
        layers: the convolutions and linear layers in it.
        dim: dimension of the output along which the plan takes something away.
        kept: positions there that stay; None: all.
    """

    name: str
    layers: tuple[str, ...]
    dim: int = 1
    kept: tuple[int, ...] | None = None

    def left(self, output: Tensor) -> Tensor:
        """What stays of the original module's output."""
        if self.kept is None:
            return output
        return output.index_select(self.dim, torch.tensor(self.kept, device=output.device))


@dataclass(frozen=True)
class _Call:
    """What a module was called with and gave, by identity and shape; the tensors are held."""

    given: Tensor
    output: Tensor


def find_segments(
    dense: nn.Module, reduced: nn.Module, plan: Plan, graph: ChannelGraph, example_input: Any, changed: Collection[str]
) -> list[Segment]:
    """The segments in which something has changed, in forward order; no two share a layer.

    Among the modules that run once, take one tensor and give one, and hold two or more layers: such as are no chain of
    smaller ones, but at most of `MOST_LAYERS` layers. So a residual block, an inverted bottleneck with its gate and a
    block of a transformer are one each. A module whose remaining outputs are not known, or whose parameters others hold
    too, is left out.

    Args:
        dense: the network before the plan's channels go.
        reduced: the one after.
        plan: what `reduced` keeps.
        graph: of `dense`.
        example_input: what the networks are called with.
        changed: names of layers to solve again.
    """
    calls = _calls(reduced, example_input)
    layers = [name for name, module in reduced.named_modules() if axes.is_weighted(module)]
    found = dict(_chosen("", reduced, calls, layers))
    wanted = {name: held for name, held in found.items() if not held.isdisjoint(changed) and not _shares(reduced, name)}
    outputs = _outputs(dense, wanted, example_input, graph.lost(plan))
    return [
        Segment(name, tuple(sorted(wanted[name])), output.dim, output.kept)
        for name, call in calls.items()
        if (output := outputs.get(name)) and output.shape == call.output.shape
    ]


def _chosen(
    name: str, module: nn.Module, calls: Mapping[str, _Call], layers: Collection[str]
) -> Iterator[tuple[str, set[str]]]:
    """Segments in a module, with their layers."""
    held = {layer for layer in layers if not name or layer.startswith(f"{name}.")}
    children = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
    parts = [part for key, child in children for part in _chosen(key, child, calls, layers)]
    chained = any(calls[one].output is calls[other].given for one, _ in parts for other, _ in parts if one != other)
    if name in calls and 2 <= len(held) <= MOST_LAYERS and not chained:
        yield name, held
    else:
        yield from parts


def _calls(model: nn.Module, example_input: Any) -> dict[str, _Call]:
    """Modules with parts of their own that run once on one sample, from one tensor to one tensor; in order of entry."""
    seen: dict[str, list[_Call | None]] = {}

    def entered(name: str, module: nn.Module, args: tuple) -> None:
        seen.setdefault(name, [])

    def left(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        others = [*args[1:], *kwargs.values()]
        plain = bool(args) and all(value is None for value in others)
        plain = plain and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        plain = plain and args[0].shape[:1] == output.shape[:1] == (1,)
        seen[name].append(_Call(args[0], output) if plain else None)

    with traceable(model), torch.no_grad():
        parents = [(name, m) for name, m in model.named_modules() if next(m.children(), None) is not None]
        handles = [module.register_forward_pre_hook(partial(entered, name)) for name, module in parents]
        handles += [module.register_forward_hook(partial(left, name), with_kwargs=True) for name, module in parents]
        with removing(handles):
            run(model, one_sample(model, example_input))
    return {name: found[0] for name, found in seen.items() if len(found) == 1 and found[0] is not None}


def _shares(model: nn.Module, name: str) -> bool:
    """Whether a module has parameters that others hold too."""
    inside: set[int] = set()
    outside: set[int] = set()
    for key, parameter in model.named_parameters(remove_duplicate=False):
        (inside if not name or key.startswith(f"{name}.") else outside).add(id(parameter))
    return not inside.isdisjoint(outside)


@dataclass(frozen=True)
class _Output:
    """What stays of a module's output: as in `Segment`, and its shape."""

    dim: int
    kept: tuple[int, ...] | None
    shape: torch.Size


def _outputs(
    model: nn.Module, names: Collection[str], example_input: Any, lost: Mapping[axes.AxisKey, list[int]]
) -> dict[str, _Output]:
    """What stays of the modules' outputs when axes lose positions; modules of which that is not known are left out."""
    seen: dict[str, Tensor | None] = {}

    def follow(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        with _disable_current_modes():
            seen[name] = follower.of(output)

    with traceable(model):
        follower = Follower(model, one_sample(model, example_input))
        with removing([model.get_submodule(name).register_forward_hook(partial(follow, name)) for name in names]):
            follower.run()
    first = follower.labels.axes
    gone = [first[axis] + place for axis, places in lost.items() if axis in first for place in places]
    labels = torch.tensor(gone, dtype=torch.float64)
    return {name: left for name, values in seen.items() if values is not None and (left := _left(values, labels))}


def _left(labels: Tensor, gone: Tensor) -> _Output | None:
    """What stays of an output with these labels; None where those that go lie along several dimensions."""
    values = compact(labels)
    lost = torch.isin(values, gone)
    if not bool(lost.any()):
        return _Output(1, None, labels.shape)
    for dim in (dim for dim, size in enumerate(values.shape) if size > 1):
        along = lost.movedim(dim, 0).flatten(1)
        if bool((along == along[:, :1]).all()):
            kept = tuple((~along[:, 0]).nonzero().flatten().tolist())
            return _Output(dim, kept, torch.Size((*labels.shape[:dim], len(kept), *labels.shape[dim + 1 :])))
    return None
