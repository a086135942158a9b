"""Sums that add: across batches, across recordings, across ranks. Nothing per image or per position is kept."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from lit_prune.errors import InputError

NARROW = 16  # below, the float32 product falls back to a plain loop and loses a digit; float64 costs nothing there
CHUNK = 8192  # samples in one float32 sum: the longest that still agrees with float64 to 1e-6
WIDE = 256  # from here on, half of a symmetric product costs less than all of it


@dataclass
class LayerSums:
    """Shifted power sums of one layer's outputs; z = y - shift, samples are images × positions.

    All fields are float64. Sums with different shifts add exactly, through `reshift`.

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
        channels = len(shift)
        shapes = [(), (channels,), (channels, channels), (), (channels,), (channels, channels), (channels, 0), (0,)]
        return cls(shift, *(shift.new_zeros(shape) for shape in shapes))

    def add(self, samples: Tensor, pooled: Tensor) -> None:
        """Adds one batch of shifted outputs: samples [S, N] float32 or float64, pooled [B, N]."""
        accumulator = Accumulator(self)
        accumulator.add(samples, pooled)
        accumulator.flush()

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


def _moved(second: Tensor, first: Tensor, count: Tensor, move: Tensor) -> Tensor:
    """Σ (z-m)(z-m)ᵀ from Σ z zᵀ and Σ z."""
    mixed = torch.outer(first, move)
    return second - mixed - mixed.T + count * torch.outer(move, move)


class SymmetricSum:
    """Σ z zᵀ [N, N] on its way into float64: in the precision of the samples for up to 8192 of them, then added.

    So the float64 matrix, whose size has nothing to do with the batch's, is touched once in many batches.

    Args:
        total: float64 [N, N], which the products are added to by `flush`.
    """

    def __init__(self, total: Tensor) -> None:
        self._total, self._count = total, 0
        self._part: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Adds the products of rows [S, N], float32 or float64."""
        rows = rows.double() if rows.shape[1] < NARROW else rows
        if self._part is None or self._part.dtype != rows.dtype:
            self.flush()
            self._part = torch.zeros_like(self._total, dtype=rows.dtype)
        for part in rows.split(CHUNK):
            if self._count + len(part) > CHUNK:
                self.flush()
            _add_upper(self._part, part)
            self._count += len(part)

    def flush(self) -> None:
        """Adds what is pending to the total."""
        if self._count:
            if len(self._part) >= WIDE:
                self._part.triu_()
                self._total += self._part.triu(1).T
            self._total += self._part
            self._part.zero_()
            self._count = 0


def _add_upper(total: Tensor, rows: Tensor) -> None:
    """Adds rowsᵀ·rows to `total` [N, N], its upper triangle at least; what lies below may be missing."""
    channels = rows.shape[1]
    if channels < WIDE:
        total.addmm_(rows.T, rows)
        return
    half = channels // 2
    _add_upper(total[:half, :half], rows[:, :half])
    _add_upper(total[half:, half:], rows[:, half:])
    total[:half, half:].addmm_(rows[:, :half].T, rows[:, half:])


class Accumulator:
    """Adds batches to a layer's sums; they are complete after `flush`.

    Args:
        sums: the layer's sums.
    """

    def __init__(self, sums: LayerSums) -> None:
        self.sums = sums
        self._second, self._pooled_second = SymmetricSum(sums.second), SymmetricSum(sums.pooled_second)

    def add(self, samples: Tensor, pooled: Tensor) -> None:
        """Adds one batch of shifted outputs: samples [S, N] float32 or float64, pooled [B, N]."""
        self.sums.samples += len(samples)
        self.sums.images += len(pooled)
        for part in samples.split(CHUNK):
            self.sums.first += part.sum(0)
        self._second.add(samples)
        self.sums.pooled_first += pooled.double().sum(0)
        self._pooled_second.add(pooled)

    def flush(self) -> None:
        """Completes the sums."""
        self._second.flush()
        self._pooled_second.flush()


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
