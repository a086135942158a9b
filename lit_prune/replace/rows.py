"""Least squares from fewer rows than inputs: the rows are kept, their products [S, S] solved, no [D, D] is formed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lit_prune.replace.regression import Fit, alive


@dataclass
class Rows:
    """Inputs u [S, D] and targets z [S, O] of one data set, in the place of `PairSums`."""

    inputs: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """S."""
        return sum(map(len, self.inputs))

    @property
    def width(self) -> int:
        """D."""
        return self.inputs[0].shape[1]

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Adds rows."""
        self.inputs.append(inputs)
        self.targets.append(targets)

    def __add__(self, other: Rows) -> Rows:
        """Both data sets."""
        return Rows(self.inputs + other.inputs, self.targets + other.targets)

    def empty(self) -> Rows:
        """No rows."""
        return Rows()

    def retargeted(self) -> Rows:
        """For the same inputs with other targets."""
        return Rows()

    def covariance(self, power: Tensor | None = None) -> RowCovariance:
        """What is solved; see `alive` for `power`."""
        inputs, targets = torch.cat(self.inputs).double(), torch.cat(self.targets).double()
        means = inputs.mean(0), targets.mean(0)
        inputs, targets = inputs - means[0], targets - means[1]
        return RowCovariance(*means, inputs, targets, alive(inputs.square().mean(0), power))


@dataclass(frozen=True)
class RowCovariance:
    """The same as `Covariance`, by rows.

    Attributes:
        input_mean: [D].
        target_mean: [O].
        inputs: [S, D], centred.
        targets: [S, O], centred.
        penalty: what a ridge is relative to, [D].
    """

    input_mean: Tensor
    target_mean: Tensor
    inputs: Tensor
    targets: Tensor
    penalty: Tensor

    @cached_property
    def _products(self) -> Tensor:
        """Of the rows in units of the penalty, [S, S]."""
        scaled = self.inputs / (len(self.inputs) * self.penalty).sqrt()
        return scaled @ scaled.T

    def error(self, fit: Fit) -> float:
        """See `Covariance.error`."""
        bias = self.target_mean - fit.weight @ self.input_mean - fit.bias
        residual = (self.targets - self.inputs @ fit.weight.T).square().mean(0) + bias.square()
        total = self.targets.square().mean(0).sum()
        return float(residual.sum() / total) if total > 0 else float(residual.sum())

    def solve(self, ridge: float, prior: Tensor | None = None) -> Fit:
        """See `Covariance.solve`; `(AᵀA + λ)⁻¹Aᵀ = Aᵀ(AAᵀ + λ)⁻¹`, A the rows in units of the penalty."""
        products = self._products.clone()
        products.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(products)
        if failed:
            return self.solve(max(10 * ridge, 1e-12), prior)
        lacking = self.targets if prior is None else self.targets - self.inputs @ prior.T
        solved = torch.cholesky_solve(lacking, factor) / len(lacking)  # [S, O]
        change = solved.T @ self.inputs / self.penalty  # [O, D]
        weight = change if prior is None else prior + change
        return Fit(weight, self.target_mean - weight @ self.input_mean, ridge)
