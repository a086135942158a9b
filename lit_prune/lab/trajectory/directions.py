"""Information directions of every layer against the direction of descent: two passes over calibration images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.lab.trajectory.gradients import (
    SUMMED,
    GradientSums,
    direction_cosines,
    gradient_sums,
    information_directions,
)
from lit_prune.measurement.layers import Batches, removing, select_layers
from lit_prune.running import undisturbed
from lit_prune.task import Task, settle


@dataclass
class DirectionSums:
    """Sums behind the cosines; they add across batches and ranks.

    Attributes:
        layers: layer name to its sums, in forward order.
        loss_gradients: layer name to Σ over images of ∂L/∂W, float64, of the weight's shape.
        images: number of images.
    """

    layers: dict[str, GradientSums] = field(default_factory=dict)
    loss_gradients: dict[str, Tensor] = field(default_factory=dict)
    images: int = 0

    def all_reduce(self) -> DirectionSums:
        """The sums over all ranks of the default process group; a collective: every rank must call it."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        layers = {name: _all_reduced(sums) for name, sums in self.layers.items()}
        gradients = {name: gradient.clone() for name, gradient in self.loss_gradients.items()}
        for gradient in gradients.values():
            torch.distributed.all_reduce(gradient)
        device = next(iter(gradients.values())).device
        images = torch.tensor(self.images, device=device)
        torch.distributed.all_reduce(images)
        return DirectionSums(layers, gradients, int(images))


def _all_reduced(sums: GradientSums) -> GradientSums:
    """One layer's sums over all ranks, around rank 0's shifts."""
    shifts = [sums.output_shift.clone(), sums.target_shift.clone()]
    for shift in shifts:
        torch.distributed.broadcast(shift, src=0)
    sums = sums.reshift(*shifts)
    samples = sums.inputs.new_tensor(sums.samples)
    added = {name: getattr(sums, name).contiguous().clone() for name in SUMMED}
    for value in (samples, *added.values()):
        torch.distributed.all_reduce(value)
    return replace(sums, samples=int(samples), **added)


def collect_directions(
    model: nn.Module,
    batches: Batches,
    target: str | None = None,
    layers: Sequence[str] | str | None = None,
    task: Task | str | None = None,
) -> DirectionSums:
    """The sums behind `direction_table`, in evaluation mode; gradients and flags of the model stay as found.

    Each batch runs twice: once for T, once for the sums of every layer, taken as the layer runs (so that operations in
    place do no harm), and for ∂L/∂W of the loss, by one backward pass.

    Args:
        model: any network.
        batches: what the task reads.
        target: a task variable with one value an image, one of the task's `variables`; None takes its default.
        layers: names or fnmatch patterns; None takes every Conv2d and Linear layer.
        task: what a batch and an output mean; None recognises it.

    Raises:
        InputError: no batch, no such layer, a target of many variables, a layer that runs twice.
    """
    chosen = select_layers(model, layers)
    sums = DirectionSums()
    task, batches = settle(task, model, batches)
    with undisturbed(model), _all_trainable(chosen):
        for piece in (piece for batch in batches for piece in task.pieces(batch)):
            piece = task.to(piece, model)
            name = target or task.default_variable(piece) or "negative_loss"
            values = task.variable(task.run(model, piece), piece, name)
            if values.shape[1] != 1:
                raise InputError(f"target: {name!r} has {values.shape[1]} variables an image; choose one with a single")
            with torch.enable_grad(), _summing(chosen, values[:, 0], sums):
                loss = task.losses(task.run(model, piece), piece).sum()
            _add_loss_gradients(loss, chosen, sums)
            sums.images += task.size(piece)
    if not sums.images:
        raise InputError("batches: there is no batch in it; give at least one")
    return sums


@contextmanager
def _all_trainable(layers: dict[str, nn.Module]) -> Iterator[None]:
    """Frozen weights take part in the backward pass inside."""
    flags = {layer.weight: layer.weight.requires_grad for layer in layers.values()}
    try:
        for weight in flags:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, flag in flags.items():
            weight.requires_grad_(flag)


@contextmanager
def _summing(layers: dict[str, nn.Module], target: Tensor, sums: DirectionSums) -> Iterator[None]:
    """Hooks that add each layer's sums of one batch."""
    seen: set[str] = set()

    def add(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if name in seen:
            raise InputError(f"layers: {name!r} runs more than once in a forward pass; leave it out with layers=")
        seen.add(name)
        with torch.no_grad():
            found = gradient_sums(layer, inputs[0], output, target)
        sums.layers[name] = sums.layers[name] + found if name in sums.layers else found

    with removing([layer.register_forward_hook(partial(add, name)) for name, layer in layers.items()]):
        yield


def _add_loss_gradients(loss: Tensor, layers: dict[str, nn.Module], sums: DirectionSums) -> None:
    ran = {name: layer for name, layer in layers.items() if name in sums.layers}
    gradients = torch.autograd.grad(loss, [layer.weight for layer in ran.values()], allow_unused=True)
    for (name, layer), gradient in zip(ran.items(), gradients, strict=True):
        gradient = torch.zeros_like(layer.weight) if gradient is None else gradient
        known = sums.loss_gradients.get(name)
        sums.loss_gradients[name] = gradient.double() if known is None else known + gradient.double()


def direction_table(model: nn.Module, sums: DirectionSums) -> pd.DataFrame:
    """Cosines between the directions in weight space, one row a layer.

    Columns: layer, depth (in forward order), channels, capture_task = cos(∇I_X, ∇I_T), update_capture = cos(-∇L, ∇I_X),
    update_task = cos(-∇L, ∇I_T), and capture_correlation, update_correlation with ∇ρ, the gradient of the signed
    correlation with T, in the place of ∇I_T; each the mean over the channels where it is defined, in [-1, 1]. The
    figures that the paper prints are those of the correlation (docs/fidelity.md).

    Source: the two-axis paper, section 3.2 and figure 4D.
    """
    rows = []
    for depth, (name, layer_sums) in enumerate(sums.layers.items()):
        weight = model.get_submodule(name).weight
        layer_sums = GradientSums(**{f.name: _on_cpu(getattr(layer_sums, f.name)) for f in fields(layer_sums)})
        directions = information_directions(weight.detach().cpu(), layer_sums)
        found = direction_cosines(directions, sums.loss_gradients[name].cpu() / sums.images)
        rows.append({"layer": name, "depth": depth, "channels": len(weight), **found})
    return pd.DataFrame(rows)


def _on_cpu(value: Tensor | int) -> Tensor | int:
    return value.cpu() if isinstance(value, Tensor) else value
