"""Sums that add: over batches, recordings and ranks. Nothing per image or per position is kept."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 21  # what is shifted stays in the cache for its means and products
DEVICE_BLOCK_BYTES = 1 << 28  # on an accelerator a launch costs more than a trip to memory
CHUNK = 8192  # rows of one float32 sum of products: the longest that still agrees with float64 to 1e-6
NARROW = 16  # so few channels go in float64: the float32 product loses a digit there and is no faster
FIRST_IMAGES = 64  # whose mean is near enough to that of all
STRIPES = 4  # of a symmetric product, each from its diagonal block on


class Moments:
    """Count, sum and products of samples z = y - shift; the one accumulator of second moments.

    Products are summed in the precision of the samples for at most `CHUNK` of them, then in float64. Moments around
    different shifts add exactly.

    Attributes:
        shift: float64 [N], near the mean, so that nothing cancels when |mean| >> std.
        count: number of samples.
        first: float64 [N], Σ z.

    Args:
        shift: [N], in the precision in which samples are multiplied.
        diagonal: whether variances alone are wanted; `second` is then Σ z², [N].
    """

    def __init__(self, shift: Tensor, diagonal: bool = False) -> None:
        self._dtype = shift.dtype if len(shift) >= NARROW else torch.float64
        self.shift = shift.double()
        self.count = 0
        self.first = torch.zeros_like(self.shift)
        self._diagonal = diagonal
        self._settled: Tensor | None = None  # of the products, the blocks on and above the diagonal
        self._pending: Tensor | None = None  # likewise, of the latest `_rows` rows
        self._rows = 0

    @classmethod
    def around(cls, values: Tensor, least: torch.dtype = torch.float32, diagonal: bool = False) -> Moments:
        """Empty moments around the mean of the first of some values [B, P, N], in the precision `least` or a higher."""
        dtype = torch.promote_types(values.dtype, least)
        return cls(values[:FIRST_IMAGES].mean((0, 1), dtype=dtype), diagonal)

    def empty(self) -> Moments:
        """Empty moments around the same shift."""
        return Moments(self.shift.to(self._dtype), self._diagonal)

    @property
    def second(self) -> Tensor:
        """Σ z zᵀ, float64 [N, N], or its diagonal [N]; the next samples are added in place."""
        self._settle()
        if self._settled is None:
            channels = len(self.shift)
            self._settled = self.shift.new_zeros(channels if self._diagonal else (channels, channels))
        if not self._diagonal:
            for start, stop in _stripes(len(self.shift)):
                self._settled[stop:, start:stop] = self._settled[start:stop, stop:].T
        return self._settled

    def add(self, values: Tensor, places: Tensor | None = None) -> Tensor:
        """Adds samples [B, P, N] and returns their means over the positions, shifted, [B, N].

        Args:
            values: any memory order; what is not float64 is shifted in float32.
            places: [B, k], the positions of each image that are samples; None: all. The means are over all of them.
        """
        images, positions, channels = values.shape
        means = values.new_empty(images, channels, dtype=self._dtype)
        most = BLOCK_BYTES if values.is_cpu else DEVICE_BLOCK_BYTES
        size = max(1, most // (max(1, positions * channels) * means.itemsize))
        memory, shift = means.new_empty(min(size, images) * positions * channels), self.shift.to(self._dtype)
        for start in range(0, images, size):
            part = values[start : start + size]
            flat = memory[: part.numel()]
            if values.stride(2) == 1:
                block = flat.view(part.shape)
            else:
                block = flat.view(channels, len(part), positions).permute(1, 2, 0)
            torch.sub(part, shift, out=block)
            torch.mean(block, 1, out=means[start : start + size])
            if places is not None:
                block = picked(block, places[start : start + size])
                self.first += block.sum((0, 1), dtype=torch.float64)
            self._multiply(block.flatten(0, 1))
        if places is None:
            self.first.add_(means.sum(0, dtype=torch.float64), alpha=positions)
        self.count += images * (positions if places is None else places.shape[1])
        return means

    def add_shifted(self, rows: Tensor) -> None:
        """Adds rows [S, N] from which the shift has been taken."""
        self.count += len(rows)
        self.first += rows.sum(0, dtype=torch.float64)
        self._multiply(rows.to(self._dtype))

    def _multiply(self, rows: Tensor) -> None:
        if self._pending is None:
            channels = len(self.shift)
            self._pending = rows.new_zeros(channels if self._diagonal else (channels, channels))
        for part in rows.split(CHUNK):
            if self._rows + len(part) > CHUNK:
                self._settle()
            self._rows += len(part)
            if self._diagonal:
                self._pending += part.square().sum(0)
                continue
            left = part.T
            for start, stop in _stripes(len(left)):
                self._pending[start:stop, start:].addmm_(left[start:stop], part[:, start:])

    def _settle(self) -> None:
        if self._pending is not None and self._rows:
            if self._settled is None:
                self._settled = torch.zeros_like(self._pending, dtype=torch.float64)
            self._settled += self._pending
            self._pending.zero_()
            self._rows = 0

    def mean(self) -> Tensor:
        """Mean of the samples, [N]."""
        return self.shift + self.first / self.count

    def variances(self) -> Tensor:
        """Population variances, [N]."""
        second = self.second if self._diagonal else self.second.diagonal()
        return second / self.count - (self.first / self.count).square()

    def covariance(self) -> Tensor:
        """Population covariance, [N, N]."""
        mean = self.first / self.count
        return (self.second / self.count).addr_(mean, mean, alpha=-1)

    def reshift(self, shift: Tensor) -> Moments:
        """The same moments around another shift [N]; exact algebra."""
        move = shift.to(self.shift) - self.shift
        if self._diagonal:
            second = self.second - 2 * move * self.first + self.count * move.square()
        else:
            second = self.second.clone().addr_(self.first, move, alpha=-1)
            second.addr_(move, self.first - self.count * move, alpha=-1)
        return self._with(self.shift + move, self.count, self.first - self.count * move, second)

    def mapped(self, weight: Tensor, bias: Tensor | None = None) -> Moments:
        """The moments of W·y + b; W [M, N], b [M]."""
        weight = weight.to(self.shift)
        shift = weight @ self.shift
        shift = shift if bias is None else shift + bias.to(shift)
        mixed, second = weight @ self.second, weight.new_empty(len(weight), len(weight))
        for start, stop in _stripes(len(weight)):
            torch.mm(mixed[start:stop], weight[start:].T, out=second[start:stop, start:])
        return self._with(shift, self.count, weight @ self.first, second)

    def __add__(self, other: Moments) -> Moments:
        other = other.reshift(self.shift)
        if not self.count:
            return other
        counts = self.count + other.count
        return self._with(self.shift, counts, self.first + other.first, self.second + other.second)

    def _with(self, shift: Tensor, count: int, first: Tensor, second: Tensor) -> Moments:
        made = Moments(shift, self._diagonal)
        made.count, made.first, made._settled = count, first, second
        return made

    def to(self, device: torch.device | str) -> Moments:
        """The moments on another device; the very same where they are there already."""
        if self.shift.device == torch.device(device):
            return self
        return self.from_state({name: value.to(device) for name, value in self.state().items()})

    def copy(self) -> Moments:
        """The moments as they are now."""
        return self.from_state({name: value.clone() for name, value in self.state().items()})

    def state(self) -> dict[str, Tensor]:
        """The sums as float64 tensors: shift, count, first, second."""
        count = self.shift.new_tensor(float(self.count))
        return {"shift": self.shift, "count": count, "first": self.first, "second": self.second}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Moments:
        """The inverse of `state`."""
        empty = cls(state["shift"], diagonal=state["second"].ndim == 1)
        return empty._with(state["shift"], int(state["count"]), state["first"], state["second"])

    def all_reduce(self) -> Moments:
        """The sums over all ranks, around rank 0's shift; a collective."""
        shift = self.shift.clone()
        torch.distributed.broadcast(shift, src=0)
        state = {name: value.contiguous().clone() for name, value in self.reshift(shift).state().items()}
        for name, value in state.items():
            if name != "shift":
                torch.distributed.all_reduce(value)
        return Moments.from_state(state | {"shift": shift})


def picked(values: Tensor, places: Tensor) -> Tensor:
    """The values [B, k, N] of [B, P, N] at the places [B, k] of each image."""
    return values.gather(1, places[:, :, None].expand(-1, -1, values.shape[2]))


def _stripes(channels: int) -> list[tuple[int, int]]:
    step = -(-channels // min(STRIPES, max(1, channels // NARROW)))  # a narrow stripe would lose a digit too
    return [(start, min(start + step, channels)) for start in range(0, channels, step)]
