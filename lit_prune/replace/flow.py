"""In which order layers run, what reads their outputs (by tensor identity), and what a plan takes from each."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_prune.measurement.layers import removing
from lit_prune.replace.kernels import is_solvable
from lit_prune.replace.walk import ADDITIONS, Stop
from lit_prune.structure import ChannelGraph, Plan, axes
from lit_prune.structure.tracing import one_sample, run, traceable

Clip = tuple[float, float]
_RELU = (torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu, F.relu_)
_BOUNDED = (F.hardtanh, F.hardtanh_)


@dataclass(frozen=True)
class Addition:
    """One addition.

    Attributes:
        operands: the layers that it alone reads, directly or after their norm.
        before: number of calls in `Flow.layers` that came before it.
        clip: range to which the sum is clipped before anything else reads it, or None.
    """

    operands: tuple[str, ...]
    before: int
    clip: Clip | None = None


@dataclass
class Flow:
    """What one pass shows.

    Attributes:
        layers: names of convolutions, linear layers and padded shortcuts, one entry a call, in order.
        norms: layer -> BatchNorm with running statistics that alone reads its output.
        additions: in order.
        clips: layer -> range to which its output (after its norm, where it has one) is clipped before anything else
            reads it: (0, inf) for ReLU, (0, 6) for ReLU6.
    """

    layers: list[str] = field(default_factory=list)
    norms: dict[str, str] = field(default_factory=dict)
    additions: list[Addition] = field(default_factory=list)
    clips: dict[str, Clip] = field(default_factory=dict)

    def stops(self, wanted: Collection[str]) -> list[Stop]:
        """Where passes wait for the layers `wanted`, in order.

        A layer that an addition reads is waited for at the addition; of two such layers the one that runs last.
        """
        place = {name: (position, 0) for position, name in enumerate(self.layers) if name in wanted}
        found = {name: Stop(name, self.norms.get(name, ""), clip=self.clips.get(name)) for name in place}
        for number, addition in enumerate(self.additions, 1):
            candidates = [name for name in addition.operands if name in place]
            if candidates:
                last = max(candidates, key=place.__getitem__)
                found[last] = replace(found[last], joined=True, clip=addition.clip)
                place[last] = (addition.before - 1, number)
        return [found[name] for name in sorted(place, key=place.__getitem__)]


def observe(model: nn.Module, example_input: Any) -> Flow:
    """Runs the model on one image; it is left as found.

    Args:
        model: any network.
        example_input: [B, C, H, W].
    """
    watch = _Watch()
    with traceable(model), torch.no_grad():
        handles = [handle for name, module in model.named_modules() for handle in watch.hooks(name, module)]
        with removing(handles), watch:
            run(model, one_sample(model, example_input))
    return watch.flow()


class _Watch(TorchFunctionMode):
    """Notes which functions read the outputs of layers and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[str] = []
        self.outputs: dict[int, tuple[str, Tensor]] = {}  # the tensors are held, so that no identity is reused
        self.retired: list = []
        self.reads: dict[str, int] = {}
        self.norms: dict[str, str] = {}
        self.additions: list[tuple[tuple[str, ...], int]] = []
        self.clips: dict[str, Clip | None] = {}

    def hooks(self, name: str, module: nn.Module) -> list:
        """Hooks on one module."""

        def wrote(module: nn.Module, args: tuple, output: Tensor) -> None:
            self.outputs[id(output)] = (name, output)
            self.layers.append(name)

        def normed(module: nn.Module, args: tuple, output: Tensor) -> None:
            source = self.outputs.get(id(args[0]))
            if source is not None:
                self.norms[source[0]] = name
            self.outputs[id(output)] = (name, output)

        if axes.is_weighted(module) or axes.is_boundary(module):
            return [module.register_forward_hook(wrote)]
        foldable = isinstance(module, axes.BATCH_NORMS) and module.running_mean is not None
        return [module.register_forward_hook(normed)] if foldable else []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Runs the function and notes which watched tensors it reads."""
        watched = [value for value in _tensors((*args, *(kwargs or {}).values())) if id(value) in self.outputs]
        versions = [value._version for value in watched]
        names = [self.outputs[id(value)][0] for value in watched]
        output = function(*args, **(kwargs or {}))
        changed = [value._version != version for value, version in zip(watched, versions, strict=True)]
        if isinstance(output, Tensor) and (any(changed) or not any(output is value for value in watched)):
            for name in names:
                self.reads[name] = self.reads.get(name, 0) + 1
                self.clips[name] = _clip(function, args, kwargs or {})
        for value, written in zip(watched, changed, strict=True):
            if written:  # in place: what is read from now on is another value
                self.retired.append(self.outputs.pop(id(value), None))
        if names and function in ADDITIONS and not kwargs and _are_alike(args):
            self.outputs[id(output)] = (_sum_name(len(self.additions)), output)
            self.additions.append((tuple(names), len(self.layers)))
        return output

    def flow(self) -> Flow:
        """What was seen."""
        alone = {name for name in self.layers if self.reads.get(name) == 1 and self.layers.count(name) == 1}
        norms = {layer: norm for layer, norm in self.norms.items() if layer in alone}
        tails = {norm: layer for layer, norm in norms.items() if self.reads.get(norm) == 1}
        tails |= {name: name for name in alone if name not in norms}
        additions = [
            Addition(tuple(tails[n] for n in names if n in tails), before, self._clip_of(_sum_name(index)))
            for index, (names, before) in enumerate(self.additions)
        ]
        clips = {layer: clip for tail, layer in tails.items() if (clip := self._clip_of(tail))}
        return Flow(self.layers, norms, additions, clips)

    def _clip_of(self, name: str) -> Clip | None:
        """Range to which the only reader of a value clips it."""
        return self.clips.get(name) if self.reads.get(name) == 1 else None


def _are_alike(args: tuple) -> bool:
    """Whether these are two maps of one shape, not a map and a number or a row to be spread."""
    return len(args) == 2 and all(isinstance(value, Tensor) for value in args) and args[0].shape == args[1].shape


def _sum_name(index: int) -> str:
    return f"+{index}"


def _clip(function, args: tuple, kwargs: dict) -> Clip | None:
    """Range to which a function clips its argument, or None."""
    if function in _RELU:
        return 0.0, float("inf")
    if function is F.relu6:
        return 0.0, 6.0
    if function in _BOUNDED:
        given = dict(zip(("min_val", "max_val"), args[1:], strict=False)) | kwargs
        return given.get("min_val", -1.0), given.get("max_val", 1.0)
    return None


def _tensors(values: tuple) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


@dataclass(frozen=True)
class Reader:
    """A layer that runs, with what the plan does to it.

    Attributes:
        name: qualified name.
        removed: input channels (columns) that go, ascending.
        kept: input channels that stay.
        outputs: output channels that stay.
        written: output channels of the layer afterwards: `outputs`, and carriers of constants where there are some.
        groups: names of the groups whose units it loses.
        obstacle: "" or why its columns cannot be replaced.
        calls: how often it runs in a forward pass.
    """

    name: str
    removed: tuple[int, ...]
    kept: tuple[int, ...]
    outputs: tuple[int, ...]
    written: tuple[int, ...]
    groups: tuple[str, ...]
    obstacle: str
    calls: int = 1


def find_readers(model: nn.Module, plan: Plan, graph: ChannelGraph, flow: Flow) -> dict[str, Reader]:
    """The layers that run, in forward order, with the input columns and output channels that the plan takes from them.

    Args:
        model: the network before the plan's channels go, without the plan's blocks.
        plan: what to keep.
        graph: of `model`.
        flow: of `model`.
    """
    lost = graph.lost(plan)
    groups: dict[str, list[str]] = {}
    for name in plan.removals:
        for member in graph.by_name[name].members:
            if member.axis == "in":
                groups.setdefault(member.module, []).append(name)
    readers = {}
    for name in dict.fromkeys(flow.layers):
        module = model.get_submodule(name)
        kept = {side: _rest(axes.width(module, side), lost.get((name, side), [])) for side in ("in", "out")}
        obstacle = _obstacle(module)
        columns = tuple(lost.get((name, "in"), ()))
        readers[name] = Reader(
            name,
            columns,
            kept["in"],
            kept["out"],
            kept["out"],
            tuple(groups.get(name, ())),
            obstacle,
            flow.layers.count(name),
        )
    return readers


def _rest(width: int, removed: list[int]) -> tuple[int, ...]:
    return tuple(sorted(set(range(width)) - set(removed)))


def _obstacle(module: nn.Module) -> str:
    """Why the input columns of `module` can neither be folded nor solved again, or ""."""
    if not axes.is_weighted(module):
        return f"it is a {type(module).__name__}, which has no weights that are known to be those of an affine map"
    if getattr(module, "groups", 1) > 1:
        return "its convolution is grouped"
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return "its weights are reparametrised"
    if not is_solvable(module):
        return f"the forward of {type(module).__name__} is another map than that of the weights that it holds"
    return ""
