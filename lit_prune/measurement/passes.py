"""One pass over the calibration batches for everything that is to be seen in it.

A collector watches a network while it runs. Collectors that need gradients and those that do not share a pass, so any
set of scores or fits costs one pass: with a backward pass where one needs it, forward alone where none does.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.layers import Batches, removing, to_model, undisturbed


class Collector(Protocol):
    """What `run_pass` carries along: made for a model, then watching it, then asked for its result.

    Attributes:
        gradients: whether it differentiates the logits.
    """

    gradients: bool

    def watch(self) -> AbstractContextManager:
        """Hooks on the network, gone on exit."""
        ...

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Takes in the batch that has just run; it may differentiate the logits, the graph is kept."""
        ...

    def result(self) -> Any:
        """What was collected."""
        ...


def run_pass(model: nn.Module, batches: Batches, collectors: Sequence[Collector]) -> None:
    """Runs the model over the batches in evaluation mode with all collectors watching.

    Raises:
        InputError: no batch.
    """
    gradients = any(collector.gradients for collector in collectors)
    seen = False
    with ExitStack() as stack:
        for collector in collectors:
            stack.enter_context(collector.watch())
        stack.enter_context(undisturbed(model, gradients))
        for images, labels in batches:
            images = to_model(model, images)
            if gradients:
                images = images.clone().requires_grad_()  # frozen networks have a gradient too
            logits = model(images)
            for collector in collectors:
                collector.add(logits, labels)
            del logits  # its graph would stay through the next forward pass
            seen = True
    if not seen:
        raise InputError("batches: no batch of (images, labels) in it; give at least one")


def collect(model: nn.Module, batches: Batches, collector: Collector) -> Any:
    """What one collector finds in a pass of its own; as `run_pass`."""
    run_pass(model, batches, [collector])
    return collector.result()


class InputGradients:
    """What the collectors share that differentiate the loss in the values which layers read.

    Attributes:
        inputs: what each layer read in the batch that has just run, by name, in the order of the pass.

    Args:
        model: any classifier.
        layers: names of convolutions and linear layers.
        seed: of what is drawn.
    """

    gradients = True

    def __init__(self, model: nn.Module, layers: Iterable[str], seed: int) -> None:
        self.model, self.layers = model, tuple(layers)
        self.generator = torch.Generator().manual_seed(seed)
        self.inputs: dict[str, Tensor] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See `Collector`."""

        def keeper(name: str):
            return lambda module, args: self.inputs.__setitem__(name, args[0])

        modules = {name: self.model.get_submodule(name) for name in self.layers}
        try:
            with removing([module.register_forward_pre_hook(keeper(name)) for name, module in modules.items()]):
                yield
        finally:
            self.inputs.clear()
