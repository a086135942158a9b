"""Symmetric products of tall matrices, summed in the precision of the rows and settled in float64."""

from __future__ import annotations

import torch
from torch import Tensor

NARROW = 16  # below, the float32 product falls back to a plain loop and loses a digit; float64 costs nothing there
CHUNK = 8192  # samples in one float32 sum: the longest that still agrees with float64 to 1e-6
WIDE = 96  # below, a product of stripes takes no less time than the whole
STRIPES = 4  # from there on, stripes of rows, each from its diagonal block on: 5/8 of the work of the whole square


class SymmetricSum:
    """Σ z zᵀ [N, N]: in the precision of the rows for up to 8192 of them, then added in float64.

    So the float64 matrix, whose size has nothing to do with the batch's, is touched once in many batches.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._part: Tensor | None = None
        self._count = 0

    def add(self, rows: Tensor) -> None:
        """Adds the products of rows [S, N], float32 or float64."""
        rows = rows.double() if rows.shape[1] < NARROW else rows
        if self._part is None or self._part.dtype != rows.dtype:
            self._settle()
            self._part = rows.new_empty(rows.shape[1], rows.shape[1])
        for part in rows.split(CHUNK):
            if self._count + len(part) > CHUNK:
                self._settle()
            _add_upper(self._part, part.T, part, keep=self._count > 0)
            self._count += len(part)

    def take(self) -> Tensor | None:
        """The sum so far, float64 [N, N]; starts anew. None if nothing was added."""
        self._settle()
        total, self._total = self._total, None
        return total

    def _settle(self) -> None:
        if self._count:
            _mirror(self._part)
            if self._total is None:
                self._total = self._part.to(torch.float64, copy=True)
            else:
                self._total += self._part
            self._count = 0


def transformed(weight: Tensor, matrix: Tensor) -> Tensor:
    """The symmetric product W·M·Wᵀ, float64 [N, N], reckoned in the precision of W like the products in M.

    Args:
        weight: W [N, C].
        matrix: M [C, C], symmetric.
    """
    total = weight.new_empty(len(weight), len(weight))
    _add_upper(total, weight @ matrix.to(weight), weight.T, keep=False)
    _mirror(total)
    return total.double()


def _stripes(channels: int) -> list[tuple[int, int]]:
    step = -(-channels // STRIPES) if channels >= WIDE else channels
    return [(start, min(start + step, channels)) for start in range(0, channels, step)]


def _add_upper(total: Tensor, left: Tensor, right: Tensor, keep: bool) -> None:
    """Adds left·right, [N, S]·[S, N], to the blocks of `total` on and above its diagonal, or puts it there."""
    for start, stop in _stripes(len(total)):
        total[start:stop, start:].addmm_(left[start:stop], right[:, start:], beta=int(keep))


def _mirror(total: Tensor) -> None:
    """Copies the blocks above the diagonal below it."""
    for start, stop in _stripes(len(total)):
        total[stop:, start:stop] = total[start:stop, stop:].T
