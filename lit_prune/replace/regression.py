"""Least squares from sums: the second moments of inputs and targets are streamed, the rows are never kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

CHUNK = 8192  # rows in one float32 product
UNTESTED_RIDGE = 1e-6  # where no data is held out to choose by
RIDGES = (1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # relative to each input's own variance
STRONG_RIDGES = (1.0, 10.0, 100.0)  # with a prior: the last leaves the weights as they are
DEAD = 1e-10  # share of the mean variance below which an input is as good as constant
FAINT = 1e-4  # the same of one that the layer does not read either


class Gathered(Protocol):
    """What has been gathered of a data set: rows of inputs [S, D] and targets [S, O], or their sums."""

    @property
    def rows(self) -> Any:
        """S."""

    @property
    def width(self) -> int:
        """D."""

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Adds rows."""

    def __add__(self, other: Any) -> Gathered:
        """Of both data sets, which are of one kind."""

    def empty(self) -> Gathered:
        """Of no rows."""

    def retargeted(self) -> Any:
        """For the same inputs with other targets, which are to be added; solved like this."""

    def covariance(self, power: Tensor | None = None) -> Any:
        """What is solved: `Covariance`, or what has its `solve` and `error`."""


@dataclass
class PairSums:
    """Shifted power sums of inputs u [S, D] and targets z [S, O], float64; sums of two data sets add.

    Attributes:
        shift: [D + O], near the means of (u, z), so that nothing cancels.
        rows: [], number of samples S.
        first: [D + O], Σ (u, z) - shift.
        inputs: [D, D], Σ u uᵀ of shifted values.
        cross: [D, O], Σ u zᵀ.
        targets: [O], Σ z².
    """

    shift: Tensor
    rows: Tensor
    first: Tensor
    inputs: Tensor
    cross: Tensor
    targets: Tensor

    @classmethod
    def zeros(cls, inputs: Tensor, targets: Tensor) -> PairSums:
        """Empty sums, shifted to the means of the given rows."""
        shift = torch.cat([inputs, targets], 1).double().mean(0)
        wide, narrow = inputs.shape[1], targets.shape[1]
        shapes = [(), (wide + narrow,), (wide, wide), (wide, narrow), (narrow,)]
        return cls(shift, *(shift.new_zeros(shape) for shape in shapes))

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Adds rows: inputs [S, D] and targets [S, O], float32 (float32 products) or float64."""
        wide = inputs.shape[1]
        shift = self.shift.to(inputs.dtype)
        self.rows += len(inputs)
        for u, z in zip(inputs.split(CHUNK), targets.split(CHUNK), strict=True):
            u, z = u - shift[:wide], z - shift[wide:]
            self.first += torch.cat([u.sum(0), z.sum(0)])
            self.inputs += u.T @ u
            self.cross += u.T @ z
            self.targets += z.square().sum(0)

    def __add__(self, other: PairSums) -> PairSums:
        """Sums of both data sets; they must have one shift."""
        values = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return PairSums(**values | {"shift": self.shift})

    def empty(self) -> PairSums:
        """Zero sums of the same shape and shift."""
        values = {f.name: torch.zeros_like(getattr(self, f.name)) for f in fields(self)}
        return PairSums(**values | {"shift": self.shift})

    @property
    def width(self) -> int:
        """D."""
        return len(self.inputs)

    def retargeted(self) -> CrossSums:
        """For the same inputs with other targets."""
        outputs = torch.zeros_like(self.targets)
        return CrossSums(self, torch.zeros_like(self.cross), outputs, outputs.clone())

    def covariance(self, power: Tensor | None = None) -> Covariance:
        """Population means and covariances; see `alive` for `power`."""
        wide = len(self.inputs)
        mean = self.first / self.rows
        u, z = mean[:wide], mean[wide:]
        inputs = (self.inputs / self.rows).addr_(u, u, alpha=-1)
        return Covariance(
            self.shift[:wide] + u,
            self.shift[wide:] + z,
            inputs,
            self.cross / self.rows - torch.outer(u, z),
            self.targets / self.rows - z.square(),
            alive(inputs.diagonal(), power),
        )


@dataclass
class CrossSums:
    """Sums of new targets z over the inputs of `PairSums` that exist already; float64.

    Attributes:
        sums: of the inputs.
        cross: [D, O], Σ (u - shift) zᵀ.
        first: [O], Σ z.
        second: [O], Σ z².
    """

    sums: PairSums
    cross: Tensor
    first: Tensor
    second: Tensor

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Adds rows: inputs [S, D] and targets [S, O]."""
        shift = self.sums.shift[: self.sums.width].to(inputs.dtype)
        for u, z in zip(inputs.split(CHUNK), targets.split(CHUNK), strict=True):
            self.cross += (u - shift).T @ z
            self.first += z.sum(0)
            self.second += z.square().sum(0)

    def covariance(self, power: Tensor | None = None) -> Covariance:
        """Population means and covariances of the inputs and the new targets, which came for all rows."""
        inputs, rows = self.sums.covariance(power), self.sums.rows
        mean = self.first / rows
        offset = inputs.input_mean - self.sums.shift[: self.sums.width]
        return Covariance(
            inputs.input_mean,
            mean,
            inputs.inputs,
            self.cross / rows - torch.outer(offset, mean),
            self.second / rows - mean.square(),
            inputs.penalty,
        )


@dataclass(frozen=True)
class Covariance:
    """Means and covariances of inputs and targets.

    Attributes:
        input_mean: [D].
        target_mean: [O].
        inputs: [D, D].
        cross: [D, O].
        targets: [O], variances.
        penalty: what a ridge is relative to, [D].
    """

    input_mean: Tensor
    target_mean: Tensor
    inputs: Tensor
    cross: Tensor
    targets: Tensor
    penalty: Tensor

    def cpu(self) -> Covariance:
        """The same on the CPU."""
        return Covariance(*(getattr(self, field.name).cpu() for field in fields(self)))

    def error(self, fit: Fit) -> float:
        """Mean squared error of `fit` on this data, summed over outputs, divided by their summed variance."""
        bias = self.target_mean - fit.weight @ self.input_mean - fit.bias
        explained = (fit.weight * (fit.weight @ self.inputs - 2 * self.cross.T)).sum(1)
        residual = (self.targets + explained + bias.square()).clamp_min(0).sum()
        return float(residual / self.targets.sum()) if self.targets.sum() > 0 else float(residual)

    def solve(self, ridge: float, prior: Tensor | None = None) -> Fit:
        """Ridge regression `argmin Σ‖W u + b - z‖² + Σ_d λ_d‖W_d - prior_d‖²`, b free, λ_d = ridge · rows · penalty_d.

        Args:
            ridge: above 0.
            prior: [O, D], where the penalty is zero; None: at zero.
        """
        inputs = self.inputs.clone()
        inputs.diagonal().add_(ridge * self.penalty)
        factor, failed = torch.linalg.cholesky_ex(inputs)
        if failed:
            return self.solve(max(10 * ridge, 1e-12), prior)
        lacking = self.cross if prior is None else self.cross - self.inputs @ prior.T
        change = torch.cholesky_solve(lacking, factor).T  # [O, D]
        weight = change if prior is None else prior + change
        return Fit(weight, self.target_mean - weight @ self.input_mean, ridge)


@dataclass(frozen=True)
class Fit:
    """A linear map z = W u + b: `weight` [O, D], `bias` [O], `ridge` relative to each input's own variance."""

    weight: Tensor
    bias: Tensor
    ridge: float


def square(matrix: Tensor, places: Tensor) -> Tensor:
    """Rows and columns at `places` [P] of a square matrix, [P, P]; one copy of 170 MB for 4,608 inputs, or none."""
    if torch.equal(places, torch.arange(len(matrix), device=places.device)):
        return matrix
    return matrix[places[:, None], places]


def ridged(inputs: Tensor, ridge: float, power: Tensor | None = None) -> Tensor:
    """Covariance [D, D] with `ridge` times each input's own variance added to it, see `alive`.

    So a fit does not change when an input is rescaled and its weights undo it.
    """
    found = inputs.clone()
    found.diagonal().add_(ridge * alive(inputs.diagonal(), power))
    return found


def alive(variances: Tensor, power: Tensor | None = None) -> Tensor:
    """The variances [D], those of inputs that are as good as constant replaced by the mean one.

    An input that the network has shut off still varies by a thousandth of what others do. Relative to that a weight of
    thousands is small, and the fit that takes it is lost with the next step of training. A unit that was made faint by
    rescaling is told from it by the weights that undo the scale.

    Args:
        variances: of the inputs.
        power: ‖W[:,d]‖² of the layer that reads them, [D]; None: unknown, and only what is fainter still counts.
    """
    typical = variances.mean() if (variances > 0).any() else variances.new_ones(())
    constant = variances <= DEAD * typical
    if power is not None:
        read = variances * power
        constant |= (variances <= FAINT * typical) & (read <= FAINT * read.mean())
    return torch.where(constant, typical, variances)


def solve_held_out(
    fitted: Gathered,
    held_out: Gathered,
    ridges: Sequence[float] = RIDGES,
    prior: Tensor | None = None,
    power: Tensor | None = None,
) -> tuple[Fit, float]:
    """The fit to both data sets with the ridge that serves the held-out one best, and the error it had there.

    Args:
        fitted: sums or rows of the fitting part.
        held_out: the same of the held-out part; without rows `UNTESTED_RIDGE` is taken, or the least candidate where
            all are larger, and the error is NaN.
        ridges: candidates, ascending; a larger one must win by more than rounding.
        prior: as in `Covariance.solve`.
        power: see `alive`.
    """
    if not held_out.rows or len(ridges) == 1:
        ridge = ridges[0] if len(ridges) == 1 else max(UNTESTED_RIDGE, ridges[0])
        fit = (fitted + held_out).covariance(power).solve(ridge, prior)
        return fit, held_out.covariance().error(fit) if held_out.rows else float("nan")
    data, test = fitted.covariance(power), held_out.covariance()
    errors: dict[float, float] = {}  # by ridge, descending
    for ridge in reversed(ridges):
        fit = data.solve(ridge, prior)
        errors[fit.ridge] = test.error(fit)
        if fit.ridge > ridge:  # too small for what rounding leaves of the covariance, and so are those below
            break
    best = min(errors.values())
    chosen = min(ridge for ridge, error in errors.items() if error <= best * (1 + 1e-9) + 1e-15)
    return (fitted + held_out).covariance(power).solve(chosen, prior), errors[chosen]
