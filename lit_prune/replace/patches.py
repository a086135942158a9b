"""Rows of a regression at a layer: its input patches, its output, and how the prediction changes with that."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.layers import removing
from lit_prune.progress import watched
from lit_prune.replace.kernels import spread, steps
from lit_prune.replace.regression import PairSums
from lit_prune.running import undisturbed
from lit_prune.structure.opened import opened
from lit_prune.task import Task
from lit_prune.task.batches import describe

ENOUGH = 1024  # rows of a layer in one product
MOST_SAMPLES = 32
MOST_VALUES = 1 << 19  # of the inputs, in one pass with gradients: an image of 224 pixels takes 350 MB in a ResNet-50


class WaitingRows:
    """Rows of layers, which wait until there are enough: to add a product of few takes as long as one of many."""

    def __init__(self) -> None:
        self._sums: dict[str, PairSums] = {}
        self._waiting: dict[str, list[Tensor]] = {}

    def add(self, name: str, rows: Tensor) -> None:
        """Adds rows of a layer."""
        waiting = self._waiting.setdefault(name, [])
        waiting.append(rows)
        if sum(map(len, waiting)) >= ENOUGH:
            self._multiply(name)

    def finish(self) -> dict[str, PairSums]:
        """The sums of all rows."""
        for name in list(self._waiting):
            self._multiply(name)
        return self._sums

    def _multiply(self, name: str) -> None:
        rows = torch.cat(self._waiting.pop(name))
        if name not in self._sums:
            self._sums[name] = PairSums.zeros(rows, rows[:, :0])
        self._sums[name].add(rows, rows[:, :0])


class PositionSample:
    """Which positions of each image are used: all of them, or a seeded sample of `per_image`."""

    def __init__(self, per_image: int, seed: int) -> None:
        self.per_image = max(1, per_image)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, images: int, positions: int) -> Tensor | None:
        """Positions, int64 [images, per_image], without repetition in an image; None for all of them."""
        if positions <= self.per_image:
            return None
        return torch.rand(images, positions, generator=self.generator).topk(self.per_image).indices


def input_rows(module: nn.Module, inputs: Tensor, chosen: Tensor | None) -> Tensor:
    """Patches that a layer reads, [rows, C·taps] in the order of its flattened kernels, zero padding included.

    Args:
        module: a convolution of any kind without groups (see `kernel_of`), or Linear.
        inputs: [B, C, ...], or [B, ..., C] of a Linear.
        chosen: positions [B, n] or None for all.
    """
    if isinstance(module, nn.Linear):
        return _pick(inputs.reshape(len(inputs), -1, inputs.shape[-1]), chosen)  # [B, P, C]
    wide = spread(module, inputs)
    if chosen is None:
        return _all_patches(module, wide)
    images, channels = wide.shape[:2]
    index = _places(module, wide, chosen.to(wide.device)).flatten(1)[:, None]  # [B, 1, n·taps]
    values = wide.flatten(2).gather(2, index.expand(-1, channels, -1))
    return values.unflatten(2, (chosen.shape[1], -1)).transpose(1, 2).reshape(images * chosen.shape[1], -1)


def _all_patches(module: nn.Module, wide: Tensor) -> Tensor:
    """Patches at all positions, [B·P, C·taps]."""
    if wide.dim() == 4:
        patches = F.unfold(wide, module.kernel_size, module.dilation, 0, steps(module))  # [B, C·taps, P]
        return patches.transpose(1, 2).flatten(0, 1)
    for axis, (taps, step, apart) in enumerate(_geometry(module)):
        wide = wide.unfold(axis + 2, apart * (taps - 1) + 1, step)[..., ::apart]
    axes = len(module.kernel_size)
    return wide.movedim(1, axes + 1).flatten(0, axes).flatten(1)  # [B, *positions, C, *taps] before


def _geometry(module: nn.Module) -> list[tuple[int, int, int]]:
    """Taps, stride and dilation of each axis."""
    return list(zip(module.kernel_size, steps(module), module.dilation, strict=True))


def _places(module: nn.Module, wide: Tensor, chosen: Tensor) -> Tensor:
    """Where the patches of the chosen positions lie in a padded, flattened map, int64 [B, n, taps]."""
    place = torch.zeros((*chosen.shape, 1), dtype=torch.int64, device=chosen.device)
    left, apart_in_memory = chosen, 1
    for (taps, step, apart), length in reversed(list(zip(_geometry(module), wide.shape[2:], strict=True))):
        count = (length - apart * (taps - 1) - 1) // step + 1  # positions along this axis
        first = (left % count * step * apart_in_memory)[..., None, None]
        offsets = torch.arange(taps, device=chosen.device)[:, None] * apart * apart_in_memory
        place = (first + offsets + place[..., None, :]).flatten(2)  # the last axis runs fastest
        left, apart_in_memory = left // count, apart_in_memory * length
    return place


def output_rows(module: nn.Module, outputs: Tensor, chosen: Tensor | None) -> Tensor:
    """Values of a layer's output (or a tensor shaped like it), [rows, O], at the same positions as `input_rows`."""
    if isinstance(module, nn.Linear):
        return _pick(outputs.reshape(len(outputs), -1, outputs.shape[-1]), chosen)
    return _pick(outputs.flatten(2).transpose(1, 2), chosen)


def channel_dim(module: nn.Module) -> int:
    """Dimension of the channels in a layer's input and output."""
    return -1 if isinstance(module, nn.Linear) else 1


def taken(values: Tensor, channels: Sequence[int], dim: int) -> Tensor:
    """The named channels of `values`, or `values` itself when it has no others."""
    if len(channels) == values.shape[dim]:
        return values
    return values.index_select(dim, torch.tensor(channels, device=values.device))


def _pick(rows: Tensor, chosen: Tensor | None) -> Tensor:
    if chosen is not None:
        index = chosen.to(rows.device)[..., None].expand(-1, -1, rows.shape[2])
        rows = rows.gather(1, index)
    return rows.flatten(0, 1)


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

    def keep(name: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        seen.append((name, args[0].detach(), output))
        return output.clone()  # what follows may write in place

    generator = torch.Generator().manual_seed(seed)
    handles = [model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in layers]
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
