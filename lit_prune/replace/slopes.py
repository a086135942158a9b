"""What layers read, and how the prediction changes with what they write."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.layers import removing
from lit_prune.progress import watched
from lit_prune.running import undisturbed
from lit_prune.structure.opened import opened
from lit_prune.task import Task
from lit_prune.task.batches import describe

MOST_SAMPLES = 32
MOST_VALUES = 1 << 19  # of the inputs, in one pass with gradients: an image of 224 pixels takes 350 MB in a ResNet-50


@dataclass(frozen=True)
class GradientSample:
    """One batch.

    Attributes:
        at: for each layer, for each of its calls, what it read and the gradient in what it wrote.
        size: number of samples.
    """

    at: Mapping[str, list[tuple[Tensor, Tensor]]]
    size: int


def gradient_samples(
    model: nn.Module, batches: Iterable[Any], layers: Sequence[str], task: Task, seed: int
) -> Iterator[GradientSample]:
    """For each batch, inputs of layers and the gradients of `v · prediction` in their outputs, v standard normal.

    Parameters get no gradient, and need not require one. Layers that the prediction does not depend on have gradient 0.

    Args:
        model: any network; left as found.
        batches: what the task reads.
        layers: names.
        task: runs the network and says what the prediction is.
        seed: of v.
    """
    seen: list[tuple[str, Tensor, Tensor]] = []

    def keeper(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            seen.append((name, args[0].detach(), output))
            return output.clone()  # what follows may write in place

        return hook

    generator = torch.Generator().manual_seed(seed)
    handles = [model.get_submodule(name).register_forward_hook(keeper(name)) for name in layers]
    with removing(handles), opened(model), undisturbed(model, gradients=True):
        for batch in watched(pieces(batches, task), "what layers read, and what it matters"):
            seen.clear()
            batch = task.to(batch, model)
            output = task.run(model, batch)
            values = task.prediction(output)
            if not values.requires_grad:
                raise InputError(
                    f"model: what it answers in evaluation mode, {describe(output)}, has no gradient (it decides, is "
                    "detached, or runs under no_grad); give task=Custom(run=...) of lit_prune.task that stops before"
                )
            probe = torch.randn(values.shape, generator=generator).to(values)
            outputs = [output for _, _, output in seen]
            gradients = torch.autograd.grad((probe * values).sum(), outputs, materialize_grads=True)
            found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
            for (name, inputs, _), gradient in zip(seen, gradients, strict=True):
                found[name].append((inputs, gradient))
            yield GradientSample(found, task.size(batch))
    seen.clear()


def pieces(batches: Iterable[Any], task: Task) -> Iterator[Any]:
    """The batches in parts whose graph fits."""
    for batch in batches:
        size = task.size(batch)
        one = sum(value.numel() for value in task.inputs(task.take(batch, 1)).args if isinstance(value, Tensor))
        piece = min(MOST_SAMPLES, max(1, MOST_VALUES // max(1, one)))
        yield from (task.take(batch, slice(start, start + piece)) for start in range(0, size, piece))
