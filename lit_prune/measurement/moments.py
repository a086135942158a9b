"""Sums that add: across batches, across recordings, across ranks. Nothing per image or per position is kept."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.measurement.products import SymmetricSum


@dataclass
class LayerSums:
    """Shifted power sums of one layer's outputs; z = y - shift, samples are images × positions.

    All fields are float64; `second` and `pooled_second` are never changed in place, for where every image has one
    position they are the same tensor. Sums with different shifts add exactly, through `reshift`.

    Attributes:
        shift: [N], near the channel means, so that nothing cancels when |mean| >> std.
        samples: [], number of images × positions.
        first: [N], Σ z.
        second: [N, N], Σ z zᵀ.
        images: [], number of images.
        pooled_first: [N], Σ z̄ with z̄ the mean over an image's positions.
        pooled_second: [N, N], Σ z̄ z̄ᵀ.
        cross: [N, V], Σ z̄ Tᵀ for V task variables; V = 0 until a target is added.
        target_first: [V], Σ T over the images of `cross`.
    """

    shift: Tensor
    samples: Tensor
    first: Tensor
    second: Tensor
    images: Tensor
    pooled_first: Tensor
    pooled_second: Tensor
    cross: Tensor
    target_first: Tensor

    @classmethod
    def zeros(cls, shift: Tensor) -> LayerSums:
        """Empty sums around `shift` [N]."""
        shift = shift.double()
        count, row = shift.new_zeros(()), torch.zeros_like(shift)
        square = shift.new_zeros(1, 1).expand(len(shift), len(shift))  # no memory before it is needed
        cross, target_first = shift.new_zeros(len(shift), 0), shift.new_zeros(0)
        return cls(shift, count, row, square, count.clone(), row.clone(), square, cross, target_first)

    def add(self, samples: Tensor, pooled: Tensor) -> None:
        """Adds one batch of shifted outputs: samples [S, N] float32 or float64, pooled [B, N]."""
        self.samples += len(samples)
        self.first += samples.sum(0, dtype=torch.float64)
        self.second = plus(self.second, _products(samples))
        self.images += len(pooled)
        self.pooled_first += pooled.sum(0, dtype=torch.float64)
        self.pooled_second = plus(self.pooled_second, _products(pooled))

    def add_target(self, pooled: Tensor, target: Tensor) -> None:
        """Adds the products of shifted pooled outputs [B, N] and task variables [B, V]."""
        if self.cross.shape[1] != target.shape[1]:
            self.cross = self.cross.new_zeros(len(self.shift), target.shape[1])
            self.target_first = self.cross.new_zeros(target.shape[1])
        target = target.to(self.cross)
        self.cross += pooled.double().T @ target
        self.target_first += target.sum(0)

    def reshift(self, shift: Tensor) -> LayerSums:
        """The same sums around another shift [N]; exact algebra."""
        move = shift.to(self.shift) - self.shift
        return LayerSums(
            shift=self.shift + move,
            samples=self.samples,
            first=self.first - self.samples * move,
            second=_moved(self.second, self.first, self.samples, move),
            images=self.images,
            pooled_first=self.pooled_first - self.images * move,
            pooled_second=_moved(self.pooled_second, self.pooled_first, self.images, move),
            cross=self.cross - torch.outer(move, self.target_first),
            target_first=self.target_first,
        )

    def __add__(self, other: LayerSums) -> LayerSums:
        other = other.reshift(self.shift)
        added = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return LayerSums(**added | {"shift": self.shift})

    def to(self, device: torch.device | str) -> LayerSums:
        """The same sums on another device."""
        return LayerSums(**{name: value.to(device) for name, value in self.state().items()})

    def state(self) -> dict[str, Tensor]:
        """The fields as a plain dict of float64 tensors."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def plus(total: Tensor, products: Tensor) -> Tensor:
    """Their sum [N, N]; the products themselves where `total` is that of `LayerSums.zeros`."""
    return products if total.stride() == (0, 0) else total + products


def _products(rows: Tensor) -> Tensor:
    """Σ z zᵀ over rows [S, N], S > 0."""
    products = SymmetricSum()
    products.add(rows)
    return products.take()


def _moved(second: Tensor, first: Tensor, count: Tensor, move: Tensor) -> Tensor:
    """Σ (z-m)(z-m)ᵀ from Σ z zᵀ and Σ z."""
    mixed = torch.outer(first, move)
    return second - mixed - mixed.T + count * torch.outer(move, move)


@dataclass
class ActivationSums:
    """Sums of all recorded layers, in forward order, and of the task variables T.

    Attributes:
        layers: layer name to its sums.
        images: number of images whose T was added.
        target_first: [V], Σ T, float64 on the CPU.
        target_second: [V], Σ T², float64 on the CPU.
    """

    layers: dict[str, LayerSums] = field(default_factory=dict)
    images: int = 0
    target_first: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    target_second: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

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
        )

    merge = __add__

    def state(self) -> dict[str, Tensor]:
        """A flat dict of float64 tensors, keys `<layer>/<field>` and three keys of the task variables."""
        state = {f"{name}/{key}": value for name, sums in self.layers.items() for key, value in sums.state().items()}
        images = torch.tensor(float(self.images), dtype=torch.float64)
        return state | {"images": images, "target_first": self.target_first, "target_second": self.target_second}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> ActivationSums:
        """The inverse of `state`."""
        layers: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            if "/" in key:
                name, _, field_name = key.rpartition("/")
                layers.setdefault(name, {})[field_name] = value
        sums = {name: LayerSums(**values) for name, values in layers.items()}
        return cls(sums, int(state["images"]), state["target_first"], state["target_second"])

    def all_reduce(self) -> ActivationSums:
        """The sums over all ranks of the default process group; a collective: every rank must call it.

        The ranks first agree on rank 0's shifts (the others move theirs, exactly), then add.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        layers = {name: _all_reduced(sums) for name, sums in self.layers.items()}
        device = next(iter(layers.values())).shift.device
        images = self.target_first.new_full((len(self.target_first),), self.images)
        targets = torch.stack([self.target_first, self.target_second, images]).to(device)
        torch.distributed.all_reduce(targets)
        first, second, counts = targets.cpu()
        return ActivationSums(layers, int(counts[0]) if len(counts) else 0, first, second)


def _all_reduced(sums: LayerSums) -> LayerSums:
    """One layer's sums over all ranks."""
    shift = sums.shift.clone()
    torch.distributed.broadcast(shift, src=0)
    state = {name: value.contiguous().clone() for name, value in sums.reshift(shift).state().items()}
    for name, value in state.items():
        if name != "shift":
            torch.distributed.all_reduce(value)
    return LayerSums(**state | {"shift": shift})
