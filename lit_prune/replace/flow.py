"""In which order layers run, and what reads their outputs: seen in one pass, by tensor identity."""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_prune.measurement.layers import removing
from lit_prune.replace.walk import ADDITIONS, Stop
from lit_prune.structure import axes
from lit_prune.structure.tracing import one_sample, run, undisturbed


@dataclass
class Flow:
    """What one pass shows.

    Attributes:
        layers: names of convolutions, linear layers and padded shortcuts, one entry a call, in order.
        norms: layer -> BatchNorm with running statistics that alone reads its output.
        additions: for each addition, the layers that it alone reads (directly or after their norm), and the number of
            calls in `layers` that came before it.
    """

    layers: list[str] = field(default_factory=list)
    norms: dict[str, str] = field(default_factory=dict)
    additions: list[tuple[tuple[str, ...], int]] = field(default_factory=list)

    def stops(self, wanted: Collection[str]) -> list[Stop]:
        """Where passes wait for the layers `wanted`, in order.

        A layer that an addition reads is waited for at the addition; of two such layers the one that runs last.
        """
        place = {name: (position, 0) for position, name in enumerate(self.layers) if name in wanted}
        joined = set()
        for operands, before in self.additions:
            candidates = [name for name in operands if name in place]
            if candidates:
                last = max(candidates, key=place.get)
                joined.add(last)
                place[last] = (before - 1, 1)
        order = sorted(place, key=place.get)
        return [Stop(name, self.norms.get(name, ""), name in joined) for name in order]


def observe(model: nn.Module, example_input: Tensor) -> Flow:
    """Runs the model on one image; it is left as found.

    Args:
        model: any network.
        example_input: [B, C, H, W].
    """
    watch = _Watch()
    with undisturbed(model), torch.no_grad():
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

        if axes.is_weighted(module) or isinstance(module, axes.PaddedShortcut):
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
            if names and function in ADDITIONS and len(args) == 2 and not kwargs:
                self.additions.append((tuple(names), len(self.layers)))
        for value, written in zip(watched, changed, strict=True):
            if written:  # in place: what is read from now on is another value
                self.retired.append(self.outputs.pop(id(value), None))
        return output

    def flow(self) -> Flow:
        """What was seen."""
        alone = {name for name in self.layers if self.reads.get(name) == 1 and self.layers.count(name) == 1}
        norms = {layer: norm for layer, norm in self.norms.items() if layer in alone}
        tails = {norm: layer for layer, norm in norms.items() if self.reads.get(norm) == 1}
        tails |= {name: name for name in alone if name not in norms}
        additions = [(tuple(tails[n] for n in names if n in tails), before) for names, before in self.additions]
        return Flow(self.layers, norms, additions)


def _tensors(values: tuple) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, Tensor)]
    return found
