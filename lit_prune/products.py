"""Symmetric products of tall matrices, summed in the precision of the rows and settled in float64."""

from __future__ import annotations

import torch
from torch import Tensor

NARROW = 16  # below, the float32 product falls back to a plain loop and loses a digit; float64 costs nothing there
CHUNK = 8192  # samples in one float32 sum: the longest that still agrees with float64 to 1e-6
STRIPES = ((96, 4), (32, 2))  # from so many channels, stripes of rows, each from its diagonal block on: 5/8, 3/4 of all


class SymmetricSum:
    """Σ z zᵀ [N, N]: in the precision of the rows for a chunk of them, then added in float64.

    So the float64 matrix, whose size has nothing to do with the batch's, is touched once in many batches. Rows come in
    lanes, each with a sum of its own until it is settled, so that threads need not meet over one product.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._stripes: list[tuple[int, int]] = []
        self._parts: list[Tensor] = []  # of a stripe each, [lanes, its rows, N - its start]
        self._lanes = self._count = 0  # lanes that hold something, rows of the first of them

    def add(self, rows: Tensor) -> None:
        """Adds the products of rows [S, N] or of lanes of rows [L, S, N], float32 or float64."""
        rows = rows if rows.ndim == 3 else rows[None]
        lanes, count, channels = rows.shape
        rows = rows.double() if channels < NARROW else rows
        if not self._parts or self._parts[0].shape[0] < lanes or self._parts[0].dtype != rows.dtype:
            self._settle()
            self._stripes = _stripes(channels)
            self._parts = [rows.new_empty(lanes, stop - start, channels - start) for start, stop in self._stripes]
        for first in range(0, count, CHUNK):
            part = rows[:, first : first + CHUNK]
            if self._count + part.shape[1] > CHUNK or lanes > self._lanes:
                self._settle()
                self._lanes = lanes
            left, keep = part.transpose(1, 2), int(self._count > 0)
            for stripe, (start, stop) in zip(self._parts, self._stripes, strict=True):
                stripe[:lanes].baddbmm_(left[:, start:stop], part[:, :, start:], beta=keep)
            self._count += part.shape[1]

    def take(self) -> Tensor | None:
        """The sum so far, float64 [N, N]; starts anew. None if nothing was added."""
        self._settle()
        total, self._total = self._total, None
        return total

    def _settle(self) -> None:
        if self._count:
            channels = self._parts[0].shape[2]
            settled = self._parts[0].new_empty(channels, channels)
            for stripe, (start, stop) in zip(self._parts, self._stripes, strict=True):
                torch.sum(stripe[: self._lanes], 0, out=settled[start:stop, start:])
            _mirror(settled)
            if self._total is None:
                self._total = settled.double()
            else:
                self._total += settled
            self._lanes = self._count = 0


def transformed(weight: Tensor, matrix: Tensor) -> Tensor:
    """The symmetric product W·M·Wᵀ, float64 [N, N], reckoned in the precision of W like the products in M.

    Args:
        weight: W [N, C].
        matrix: M [C, C], symmetric.
    """
    total = weight.new_empty(len(weight), len(weight))
    mixed = weight @ matrix.to(weight)
    for start, stop in _stripes(len(total)):
        torch.mm(mixed[start:stop], weight[start:].T, out=total[start:stop, start:])
    _mirror(total)
    return total.double()


def _stripes(channels: int) -> list[tuple[int, int]]:
    step = -(-channels // next((stripes for fewest, stripes in STRIPES if channels >= fewest), 1))
    return [(start, min(start + step, channels)) for start in range(0, channels, step)]


def _mirror(total: Tensor) -> None:
    """Copies the blocks above the diagonal below it."""
    for start, stop in _stripes(len(total))[:-1]:
        total[stop:, start:stop] = total[start:stop, stop:].T
