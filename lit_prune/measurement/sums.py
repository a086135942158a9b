"""What is kept of a recording: the sums of each layer's outputs and of the task variables, which add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.measurement.moments import Moments


@dataclass
class LayerSums:
    """What is kept of one layer's outputs.

    Attributes:
        outputs: moments over images and positions.
        pooled: moments of the means over positions, one sample an image, around the same shift; the same object where
            every image has one position.
        cross: [N, V], Σ z̄ Tᵀ for V task variables, float64; V = 0 until a target is added.
        target_first: [V], Σ T over the samples of `cross`.
        crossed: number of those.
    """

    outputs: Moments
    pooled: Moments
    cross: Tensor
    target_first: Tensor
    crossed: int = 0

    @classmethod
    def around(cls, values: Tensor, one_position: bool = False) -> LayerSums:
        """Empty sums around the mean of the first of some values [B, P, N]."""
        outputs = Moments.around(values)
        pooled = outputs if one_position else outputs.empty()
        return cls(outputs, pooled, outputs.shift.new_zeros(len(outputs.shift), 0), outputs.shift.new_zeros(0))

    def add_target(self, pooled: Tensor, target: Tensor) -> None:
        """Adds the products of shifted means [B, N] and task variables [B, V]."""
        target = target.to(self.cross)
        if self.cross.shape[1] != target.shape[1]:
            self.cross = self.cross.new_zeros(len(self.cross), target.shape[1])
            self.target_first, self.crossed = target.new_zeros(target.shape[1]), 0
        self.cross += pooled.double().T @ target
        self.target_first += target.sum(0)
        self.crossed += len(target)

    def _both(self, change: Callable[[Moments], Moments]) -> tuple[Moments, Moments]:
        outputs = change(self.outputs)
        return outputs, outputs if self.pooled is self.outputs else change(self.pooled)

    def reshift(self, shift: Tensor) -> LayerSums:
        """The same sums around another shift [N]; exact algebra."""
        outputs, pooled = self._both(lambda moments: moments.reshift(shift))
        move = shift.to(self.cross) - self.pooled.shift
        return replace(self, outputs=outputs, pooled=pooled, cross=self.cross - torch.outer(move, self.target_first))

    def __add__(self, other: LayerSums) -> LayerSums:
        other = other.reshift(self.outputs.shift)
        added = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return LayerSums(**added)

    def to(self, device: torch.device | str) -> LayerSums:
        """The sums on another device."""
        outputs, pooled = self._both(lambda moments: moments.to(device))
        return LayerSums(outputs, pooled, self.cross.to(device), self.target_first.to(device), self.crossed)

    def copy(self) -> LayerSums:
        """The sums as they are now."""
        outputs, pooled = self._both(Moments.copy)
        return LayerSums(outputs, pooled, self.cross.clone(), self.target_first.clone(), self.crossed)

    def all_reduce(self) -> LayerSums:
        """The sums over all ranks, around rank 0's shift; a collective."""
        outputs, pooled = self._both(Moments.all_reduce)
        cross = (self.cross - torch.outer(outputs.shift - self.outputs.shift, self.target_first)).contiguous()
        rest = torch.cat([self.target_first.clone(), self.cross.new_tensor([float(self.crossed)])])
        for value in (cross, rest):
            torch.distributed.all_reduce(value)
        return LayerSums(outputs, pooled, cross, rest[:-1], int(rest[-1]))


@dataclass
class ActivationSums:
    """Sums of all recorded layers, in forward order, and of the task variables T.

    Attributes:
        layers: layer name to its sums.
        images: number of samples of T.
        target_first: [V], Σ T, float64 on the CPU.
        target_second: [V], Σ T², float64 on the CPU.
        left_out: layer name to why it, or its target axis, is not there.
    """

    layers: dict[str, LayerSums] = field(default_factory=dict)
    images: int = 0
    target_first: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    target_second: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    left_out: dict[str, str] = field(default_factory=dict)

    def add_target(self, target: Tensor) -> None:
        """Adds one batch of task variables [B, V]."""
        target = target.to("cpu", torch.float64)
        if len(self.target_first) != target.shape[1]:
            self.target_first = self.target_second = target.new_zeros(target.shape[1])
        self.images += len(target)
        self.target_first = self.target_first + target.sum(0)
        self.target_second = self.target_second + target.square().sum(0)

    def __add__(self, other: ActivationSums) -> ActivationSums:
        if set(self.layers) != set(other.layers):
            raise InputError("sums: the two recordings are of different layers; record both with the same layers=")
        return ActivationSums(
            {name: sums + other.layers[name] for name, sums in self.layers.items()},
            self.images + other.images,
            self.target_first + other.target_first,
            self.target_second + other.target_second,
            self.left_out | other.left_out,
        )

    def copy(self) -> ActivationSums:
        """The sums as they are now."""
        return replace(self, layers={name: sums.copy() for name, sums in self.layers.items()})

    def all_reduce(self) -> ActivationSums:
        """The sums over all ranks of the default process group; a collective: every rank must call it.

        The ranks first agree on rank 0's shifts (the others move theirs, exactly), then add.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        layers = {name: sums.all_reduce() for name, sums in self.layers.items()}
        device = next(iter(layers.values())).cross.device
        images = self.target_first.new_tensor([float(self.images)])
        targets = torch.cat([self.target_first, self.target_second, images]).to(device)
        torch.distributed.all_reduce(targets)
        first, second = targets[:-1].cpu().unflatten(0, (2, -1))
        return replace(self, layers=layers, images=int(targets[-1]), target_first=first, target_second=second)
