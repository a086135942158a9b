"""Channel independence: what a layer's feature matrix loses in nuclear norm without one of its rows.

Source: Sui et al. 2021 (CHIP), equations 3 and 4.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.measurement.layers import position_view, removing, select_layers
from lit_prune.task import Task

STEP = 0.45  # of the trapezoid rule on log s: its error is exp(-π²/STEP), 3e-10
LOWEST, HIGHEST = -26.0, 16.0  # of log s, for a matrix whose largest singular value is 1
EPSILON = torch.finfo(torch.float64).eps
CHUNK_VALUES = 2**23  # float64 values held at once (64 MB)


def nuclear_drops(features: Tensor) -> Tensor:
    """Drop of the nuclear norm of each matrix when one row at a time is set to zero, for all rows at once.

    With AᵀA = V Λ Vᵀ and z_i = Vᵀa_i the Gram matrix without row i is V (Λ - z_i z_iᵀ) Vᵀ. From
    √x = (2/π) ∫ x/(x+s²) ds and the determinant lemma,

        ‖A‖_* - ‖A without i‖_* = -(1/π) ∫_0^∞ log(1 - Σ_k z_ik²/(λ_k + s²)) ds,

    so one eigendecomposition of the smaller Gram matrix and one matrix product give all rows. The integral is taken by
    the trapezoid rule in log s, which converges exponentially; agreement with singular values is about 1e-7 of the
    largest one, the square root of float64's precision, which a Gram matrix costs.

    Args:
        features: A, [B, N, P].

    Returns:
        float64 [B, N], at least 0.
    """
    features = features.double()
    largest = torch.linalg.matrix_norm(features).clamp_min(torch.finfo(torch.float64).tiny)  # Frobenius
    features = features / largest[:, None, None]
    powers, weights = _spectrum(features)  # λ [B, m], z² [B, N, m]
    nodes = torch.arange(LOWEST, HIGHEST, STEP, dtype=torch.float64, device=features.device).exp()  # s, [J]
    damped = 1 / (powers[:, :, None] + nodes.square())  # [B, m, J]
    lengths = weights.sum(2, keepdim=True)  # ‖a_i‖²
    most = lengths / (nodes.square() + lengths)  # Σ is never above it, but for rounding
    logs = torch.log1p(-torch.minimum(weights @ damped, most).clamp_max(1 - EPSILON))  # [B, N, J]
    tail = lengths[..., 0] / nodes[-1] / math.expm1(STEP)  # the nodes beyond the last, where the log is -‖a_i‖²/s²
    integral = STEP * (tail - logs @ nodes)
    return (integral / math.pi).clamp_min(0) * largest[:, None]


def _spectrum(features: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [B, m] of AᵀA, m = min(N, P), and squared components [B, N, m] of the rows along eigenvectors."""
    rows, columns = features.shape[1:]
    if rows <= columns:
        powers, vectors = torch.linalg.eigh(features @ features.mT)
        powers = powers.clamp_min(0)
        return powers, vectors.square() * powers[:, None]
    powers, vectors = torch.linalg.eigh(features.mT @ features)
    return powers.clamp_min(0), (features @ vectors).square()


class Independence:
    """Mean over images of `nuclear_drops` of the raw output [channels, positions] of every layer.

    An image of a layer without positions gives a single column.
    """

    gradients = False

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.task = task
        self.layers = select_layers(model)
        self.totals: dict[str, Tensor] = {}
        self.count = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See `passes.Collector`."""

        def note(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
            matrices = position_view(module, output.detach(), token=None).mT  # [B, N, P]
            nodes = int((HIGHEST - LOWEST) / STEP) + 1
            images = max(1, CHUNK_VALUES // (matrices.shape[1] * max(nodes, matrices.shape[2])))
            drops = torch.stack([nuclear_drops(part).sum(0) for part in matrices.split(images)]).sum(0).cpu()
            self.totals[name] = self.totals.get(name, 0.0) + drops

        with removing([module.register_forward_hook(partial(note, name)) for name, module in self.layers.items()]):
            yield

    def add(self, output: Any, batch: Any) -> None:
        """See `passes.Collector`."""
        self.count += self.task.size(batch)

    def result(self) -> dict[str, Tensor]:
        """Layer -> float64 [N]."""
        return {name: total / self.count for name, total in self.totals.items()}
