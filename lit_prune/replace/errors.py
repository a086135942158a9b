"""How far outputs of the reduced network are from the original's, and how much the original's differ among samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.measurement.layers import removing
from lit_prune.replace.flow import Reader
from lit_prune.replace.patches import channel_dim, pieces
from lit_prune.running import undisturbed
from lit_prune.task import Task

MOST_IMAGES = 512


@dataclass
class OutputError:
    """Sums over images and positions of one layer's outputs, each [O] float64.

    Attributes:
        samples: images × positions.
        squared: squared difference.
        first: outputs of the original network.
        second: their squares.
    """

    samples: int = 0
    squared: Tensor = field(default_factory=lambda: torch.zeros(()))
    first: Tensor = field(default_factory=lambda: torch.zeros(()))
    second: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, original: Tensor, reduced: Tensor) -> None:
        """Adds outputs [S, O]."""
        self.samples += len(original)
        self.squared = self.squared + (reduced - original).square().sum(0, dtype=torch.float64)
        self.first = self.first + original.sum(0, dtype=torch.float64)
        self.second = self.second + original.square().sum(0, dtype=torch.float64)

    @property
    def variance(self) -> float:
        """Variance of the original's outputs, summed over channels."""
        return float((self.second / self.samples - (self.first / self.samples).square()).sum())

    def report(self, border: float) -> dict[str, float]:
        """`error`: mean squared difference over the variance; `border_error`: the part that zero padding makes."""
        variance = self.variance or 1.0
        return {"error": float(self.squared.sum()) / self.samples / variance, "border_error": border / variance}


def output_errors(
    original: nn.Module,
    reduced: nn.Module,
    readers: Sequence[Reader],
    norms: Mapping[str, str],
    batches: Sequence[Any],
    task: Task,
) -> dict[str, OutputError]:
    """Errors of the readers' outputs, each in its own network, on at most `MOST_IMAGES` images.

    A shift that was folded into the norm behind a layer counts as part of the layer's output.

    Args:
        original: network before.
        reduced: network after, with the same names.
        readers: layers to compare, and which of their outputs are left.
        norms: layer -> BatchNorm behind it.
        batches: what the task reads.
        task: what a batch means.
    """
    errors = {reader.name: OutputError() for reader in readers}
    seen = 0
    for batch in pieces(batches, task):
        if seen >= MOST_IMAGES:
            break
        before, after = (_outputs(network, task, batch, list(errors)) for network in (original, reduced))
        for reader in readers:
            shift = _shift(original, reduced, norms.get(reader.name, ""), reader)
            for target, result in zip(before[reader.name], after[reader.name], strict=True):
                errors[reader.name].add(target[:, list(reader.outputs)], result[:, _left(reader)] + shift)
        seen += task.size(batch)
    return errors


def _left(reader: Reader) -> list[int]:
    """Places of the outputs that are left in what the reduced layer writes."""
    return [place for place, channel in enumerate(reader.written) if channel in set(reader.outputs)]


def _shift(original: nn.Module, reduced: nn.Module, norm: str, reader: Reader) -> Tensor | float:
    """What the norm behind a layer adds to its outputs, [O]."""
    if not norm:
        return 0.0
    means = [network.get_submodule(norm).running_mean for network in (original, reduced)]
    return means[0][list(reader.outputs)] - means[1][_left(reader)]


def _outputs(model: nn.Module, task: Task, batch: Any, layers: Sequence[str]) -> dict[str, list[Tensor]]:
    """What each call of each layer writes, [S, O]."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keeper(name: str):
        dim = channel_dim(model.get_submodule(name))
        return lambda module, args, output: found[name].append(output.movedim(dim, -1).flatten(0, -2))

    handles = [model.get_submodule(name).register_forward_hook(keeper(name)) for name in layers]
    with removing(handles), undisturbed(model):
        task.run(model, task.to(batch, model))
    return found


@dataclass
class Spread:
    """Power sums of answers [B, D], float64; batch by batch.

    Attributes:
        count: samples.
        moments: sums over samples of each value and of its square, [D] both; None before the first batch, and where
            the number of values differs among batches, as of images of several sizes.
        total: the same sums over all values, and how many there are.
    """

    count: int = 0
    moments: tuple[Tensor, Tensor] | None = None
    total: tuple[float, float, int] = (0.0, 0.0, 0)

    def add(self, values: Tensor) -> None:
        """Adds a batch."""
        first, second, number = self.total
        self.total = first + float(values.sum()), second + float(values.square().sum()), number + values.numel()
        sums = values.sum(0), values.square().sum(0)
        if not self.count:
            self.moments = sums
        elif self.moments is not None:
            fits = self.moments[0].shape == sums[0].shape
            self.moments = (self.moments[0] + sums[0], self.moments[1] + sums[1]) if fits else None
        self.count += len(values)

    def variance(self) -> float:
        """Mean over samples of `Σ_d (a_d - mean_d)²`; with several D, of the distance to the mean of all values."""
        if self.moments is None:
            first, second, number = self.total
            return (second - first**2 / number) / self.count
        first_moments, second_moments = self.moments
        return float((second_moments - first_moments.square() / self.count).sum()) / self.count
