"""Symmetric products of tall matrices, summed in the precision of the rows and settled in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NARROW = 16  # below, the float32 product falls back to a plain loop and loses a digit; float64 costs nothing there
CHUNK = 8192  # samples in one float32 sum: the longest that still agrees with float64 to 1e-6
STRIPES = ((1024, 8), (96, 4), (32, 2))  # from so many channels, stripes of rows, each from its diagonal block on


class SymmetricSum:
    """Σ z zᵀ [N, N]: in the precision of the rows for a chunk of them, then added in float64.

    So the float64 matrix, whose size has nothing to do with the batch's, is touched once in many batches. Rows come in
    lanes, each with a sum of its own until it is settled, so that threads need not meet over one product.

    Args:
        chunk: rows of a lane in the first sum of their own precision. The rounding of chunks of c rows is independent,
            so that of K rows goes with c/√K: later ones take √(chunk·K) rows, at most CHUNK, all as exact as the first.
    """

    def __init__(self, chunk: int = CHUNK) -> None:
        self._chunk = chunk
        self._rows = 0  # of all lanes, since the beginning
        self._total: Tensor | None = None  # its blocks on and above the diagonal
        self._stripes: list[tuple[int, int]] = []
        self._pending: list[Tensor] = []  # of a stripe each, [lanes, its rows, N - its start]
        self._lanes = self._count = 0  # lanes that hold something, rows of the first of them

    def add(self, rows: Tensor) -> None:
        """Adds the products of rows [S, N] or of lanes of rows [L, S, N], float32 or float64."""
        rows = rows if rows.ndim == 3 else rows[None]
        lanes, count, channels = rows.shape
        rows = rows.double() if channels < NARROW else rows
        if not self._pending or self._pending[0].shape[0] < lanes or self._pending[0].dtype != rows.dtype:
            self._settle()
            self._stripes = _stripes(channels)
            self._pending = [rows.new_empty(lanes, stop - start, channels - start) for start, stop in self._stripes]
        first = 0
        while first < count:
            longest = min(CHUNK, max(self._chunk, math.isqrt(self._chunk * self._rows)))
            some = rows[:, first : first + longest]
            if self._count + some.shape[1] > longest or lanes > self._lanes:
                self._settle()
                self._lanes = lanes
            left, keep = some.transpose(1, 2), int(self._count > 0)
            for pending, (start, stop) in zip(self._pending, self._stripes, strict=True):
                pending[:lanes].baddbmm_(left[:, start:stop], some[:, :, start:], beta=keep)
            first += some.shape[1]
            self._count += some.shape[1]
            self._rows += some.shape[1] * lanes

    def take(self) -> Tensor | None:
        """The sum so far, float64 [N, N]; starts anew. None if nothing was added."""
        self._settle()
        total, self._total = self._total, None
        if total is not None:
            _mirror(total)
        return total

    def _settle(self) -> None:
        if self._count:
            if self._total is None:
                self._total = self._pending[0].new_zeros(self._pending[0].shape[2:] * 2, dtype=torch.float64)
            for pending, (start, stop) in zip(self._pending, self._stripes, strict=True):
                stripe = self._total[start:stop, start:]
                stripe += pending[0] if self._lanes == 1 else pending[: self._lanes].sum(0)
            self._lanes = self._count = 0


def transformed(weight: Tensor, matrix: Tensor) -> Tensor:
    """The symmetric product W·M·Wᵀ [N, N].

    Args:
        weight: W [N, C].
        matrix: M [C, C], symmetric, in the same precision.
    """
    total = weight.new_empty(len(weight), len(weight))
    mixed = weight @ matrix
    for start, stop in _stripes(len(total)):
        torch.mm(mixed[start:stop], weight[start:].T, out=total[start:stop, start:])
    _mirror(total)
    return total


def _stripes(channels: int) -> list[tuple[int, int]]:
    stripes = next((stripes for fewest, stripes in STRIPES if channels >= fewest), 1)
    step = -(-channels // stripes)
    return [(start, min(start + step, channels)) for start in range(0, channels, step)]


def _mirror(total: Tensor) -> None:
    """Copies the blocks above the diagonal below it."""
    for start, stop in _stripes(len(total))[:-1]:
        total[stop:, start:stop] = total[start:stop, stop:].T
