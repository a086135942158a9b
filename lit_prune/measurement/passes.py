"""One pass over the calibration batches for everything that is to be seen in it.

A collector watches a network while it runs. Collectors that need gradients and those that do not share a pass, so any
set of scores or fits costs one pass: with a backward pass where one needs it, forward alone where none does.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError, UndefinedLossError
from lit_prune.measurement.layers import Batches, removing
from lit_prune.running import undisturbed
from lit_prune.structure.opened import opened
from lit_prune.task import Task


class Collector(Protocol):
    """What `run_pass` carries along: made for a model, then watching it, then asked for its result.

    Attributes:
        gradients: whether it differentiates the output.
        losses: whether it asks for the losses of samples; absent where it does not.
    """

    gradients: bool

    def watch(self) -> AbstractContextManager:
        """Hooks on the network, gone on exit."""
        ...

    def add(self, output: Any, batch: Any) -> None:
        """Takes in the batch that has just run; it may differentiate the output, the graph is kept."""
        ...

    def result(self) -> Any:
        """What was collected."""
        ...


def run_pass(model: nn.Module, batches: Batches, collectors: Sequence[Collector], task: Task) -> None:
    """Runs the model over the batches in evaluation mode with all collectors watching.

    A task whose loss is one number for a batch is run sample by sample where a collector asks for losses.

    Raises:
        InputError: no batch, or one without a finite loss where losses are asked for.
    """
    gradients = any(collector.gradients for collector in collectors)
    one_by_one = any(getattr(collector, "losses", False) for collector in collectors)
    seen = False
    with ExitStack() as stack:
        for collector in collectors:
            stack.enter_context(collector.watch())
        stack.enter_context(opened(model))  # there the projections of every attention run as layers
        stack.enter_context(undisturbed(model, gradients))
        if gradients:
            stack.enter_context(removing([model.register_forward_pre_hook(differentiable, with_kwargs=True)]))
        for number, batch in enumerate(batches):
            for piece in task.pieces(batch) if one_by_one else (batch,):
                piece = task.to(piece, model)
                output = task.run(model, piece)
                with _named(number):
                    for collector in collectors:
                        collector.add(output, piece)
                del output  # its graph would stay through the next forward pass
                seen = True
    if not seen:
        raise InputError("batches: there is no batch in it; give at least one")


@contextmanager
def _named(number: int) -> Iterator[None]:
    try:
        yield
    except UndefinedLossError as error:
        raise InputError(
            f"batches: the loss of batch {number} is NaN or infinite; mend the network or the data"
        ) from error


def collect(model: nn.Module, batches: Batches, collector: Collector, task: Task) -> Any:
    """What one collector finds in a pass of its own; as `run_pass`."""
    run_pass(model, batches, [collector], task)
    return collector.result()


def differentiable(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook: floating-point inputs as copies that require a gradient; frozen networks have one then too."""

    def change(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.clone().requires_grad_() if not value.requires_grad else value
        return type(value)(map(change, value)) if type(value) in (list, tuple) else value

    return tuple(map(change, args)), {name: change(value) for name, value in kwargs.items()}


class InputGradients:
    """What the collectors share that differentiate the loss in the values which layers read.

    Attributes:
        inputs: what each layer read in the batch that has just run, call by call, by name, in the order of the pass.
    """

    gradients = True

    def __init__(self, model: nn.Module, layers: Iterable[str], seed: int) -> None:
        self.model, self.layers = model, tuple(layers)
        self.generator = torch.Generator().manual_seed(seed)
        self.inputs: dict[str, list[Tensor]] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See `Collector`."""

        def keeper(name: str):
            return lambda module, args: self.inputs.setdefault(name, []).append(args[0])

        modules = {name: self.model.get_submodule(name) for name in self.layers}
        handles = [module.register_forward_pre_hook(keeper(name)) for name, module in modules.items()]
        try:
            with removing(handles):
                yield
        finally:
            self.inputs.clear()

    def gradients_of(self, values: Tensor, create_graph: bool = False) -> dict[str, list[Tensor]]:
        """Gradients of the sum of `values` [B] in what each layer read, call by call; zero where there is none."""
        tracked = [value for calls in self.inputs.values() for value in calls if value.requires_grad]
        if not values.requires_grad or not tracked:
            raise InputError("model: its loss does not depend on what its layers read; nothing can be differentiated")
        found = torch.autograd.grad(values.sum(), tracked, None, True, create_graph, allow_unused=True)
        known = {id(value): gradient for value, gradient in zip(tracked, found, strict=True) if gradient is not None}
        return {
            name: [known[id(value)] if id(value) in known else torch.zeros_like(value) for value in calls]
            for name, calls in self.inputs.items()
        }
