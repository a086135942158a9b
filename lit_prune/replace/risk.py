"""Second-order replacement risk sample by sample: what affine stand-ins are fitted to when the loss is the measure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.replace.curvature import Curvature

NUMBERS_AT_ONCE = 250_000  # float64 values of one batch of designs: 2 MB, which stay in the cache


@dataclass(frozen=True)
class RiskRows:
    """Values, gradients and diagonal curvature of the loss at the input channels of one layer, float64 [rows, C].

    Attributes:
        values: a.
        gradient: ∂L/∂a for the true labels.
        curvature: ∂²L/∂a², at least 0.
        images: images the rows come from; a mean over images divides sums over rows by it.
        method: "exact" or "gauss_newton".
    """

    values: Tensor
    gradient: Tensor
    curvature: Tensor
    images: float
    method: str

    def without_gradient(self) -> "RiskRows":
        """The same with every sample's gradient taken as zero: curvature-weighted squares are left."""
        return replace(self, gradient=torch.zeros_like(self.gradient))


@dataclass(frozen=True)
class WeightedFit:
    """Affine stand-ins of some channels: `offsets` [R], `coefficients` [R, r] on the chosen parents, `risk` [R] nats.

    `singular`: how many of the normal equations could be solved only with the ridge.
    """

    offsets: Tensor
    coefficients: Tensor
    risk: Tensor
    singular: int


def weighted_affine(rows: RiskRows, replaced: Sequence[int], parents: Tensor, ridge: float) -> WeightedFit:
    """Minimises `gᵀ(Φθ - a) + ½ (Φθ - a)ᵀ D (Φθ - a)` plus a ridge for each replaced channel, D = diag(h).

    The intercept is not penalised, so that without parents the constant of equation 7 comes out. A channel without any
    curvature is fitted by plain least squares. All but the parents' Gram matrices comes from two products for all
    replaced channels; the Gram matrices are gathered a few channels at a time.

    Args:
        rows: the second-order data.
        replaced: channels j, [R].
        parents: channels that stand in for each, int64 [R, r].
        ridge: relative to each parent's own weighted variance, at least 0.

    Returns:
        The fits; their risk is the mean over images.

    Raises:
        InputError: fewer rows than coefficients.

    Source: causal mechanism reduction, affine case of theorem 1.
    """
    count = parents.shape[1]
    if len(rows.values) < count + 1:
        raise InputError(
            f"parents={count}: {len(rows.values)} calibration samples are too few for {count} parents and an offset; "
            "use more images or fewer parents"
        )
    places = torch.as_tensor(list(replaced))
    shift = rows.values.mean(0)
    values = (rows.values - shift).T.contiguous()  # [C, n]
    a, g, h = values[places], rows.gradient.T[places], rows.curvature.T[places]  # [R, n]
    flat = h.sum(1) <= 1e-12 * rows.curvature.sum(0).amax()
    h, g = torch.where(flat[:, None], 1.0, h), torch.where(flat[:, None], 0.0, g)
    total, pull = h.sum(1), g.sum(1)
    centred = a - ((h * a).sum(1) / total)[:, None]
    centre = (values @ h.T).T.gather(1, parents) / total[:, None]  # [R, r]
    wanted = (values @ (h * centred - g).T).T.gather(1, parents) + centre * pull[:, None]
    gram = _grams(values, h, parents) - total[:, None, None] * centre[:, :, None] * centre[:, None]  # [R, r, r]
    theta, singular = solve_ridged(gram, wanted[..., None], ridge)
    theta = theta[..., 0]
    offsets = (a - centred)[:, 0] - (theta * centre).sum(1) - pull / total
    offsets += shift[places] - (theta * shift[parents]).sum(1)
    alone = (0.5 * h * centred.square() - g * centred).sum(1) - 0.5 * pull.square() / total
    gained = (theta * (wanted - 0.5 * (gram @ theta[..., None])[..., 0])).sum(1)
    risk = torch.where(flat, 0.0, (alone - gained) / rows.images)
    return WeightedFit(offsets, theta, risk, int(singular.sum()))


def _grams(values: Tensor, weights: Tensor, parents: Tensor) -> Tensor:
    """`Σ_s h_s a_ps a_qs` over each row's parents p, q: values [C, n], weights [R, n], parents [R, r]; [R, r, r]."""
    chunk = max(1, NUMBERS_AT_ONCE // (values.shape[1] * max(1, parents.shape[1])))
    grams = []
    for some, roots in zip(parents.split(chunk), weights.sqrt().split(chunk), strict=True):
        design = values[some].mul_(roots[:, None])  # [chunk, r, n]
        grams.append(design @ design.mT)
    return torch.cat(grams)


def solve_ridged(gram: Tensor, wanted: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Solutions of `(gram + ridge · diag(gram)) θ = wanted`, and which would be singular without the ridge.

    Every parent is penalised by its own power, so that a parent's scale changes nothing but its coefficient.

    Args:
        gram: positive semidefinite, [R, r, r].
        wanted: [R, r, M].
        ridge: at least 0; where that does not suffice it is raised tenfold until it does.
    """
    if not gram.shape[-1]:
        return wanted.clone(), torch.zeros(len(wanted), dtype=torch.bool)
    power = gram.diagonal(dim1=1, dim2=2)
    bare, failed = torch.linalg.cholesky_ex(gram)
    pivots = bare.diagonal(dim1=1, dim2=2).square()
    singular = (failed > 0) | (pivots <= 1e-12 * power).any(1)
    floor = (1e-12 * power.mean(1, keepdim=True)).clamp_min(torch.finfo(torch.float64).tiny)
    loading = torch.diag_embed(power.maximum(floor))
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * loading)
        if not failed.any():
            return torch.cholesky_solve(wanted, factor), singular
        ridge = max(10 * ridge, 1e-12)


@dataclass(frozen=True)
class SoftmaxHead:
    """A linear classifier over units with cross-entropy on top: gradients and curvature in closed form, exact.

    Attributes:
        values: what the classifier reads, float64 [n, C].
        labels: int64 [n].
        weight: float64 [K, C].
        bias: float64 [K].
    """

    values: Tensor
    labels: Tensor
    weight: Tensor
    bias: Tensor

    @cached_property
    def probabilities(self) -> Tensor:
        """Softmax outputs p, [n, K]."""
        return (self.values @ self.weight.T + self.bias).softmax(1)

    @cached_property
    def expected(self) -> Tensor:
        """E_k W[k, j] under p, [n, C]."""
        return self.probabilities @ self.weight

    @cached_property
    def gradient(self) -> Tensor:
        """∂L/∂a, [n, C]."""
        _check_labels(self.labels, len(self.values), len(self.weight))
        return self.expected - self.weight[self.labels]

    def rows(self) -> RiskRows:
        """The samples' gradients and curvature `Var_p W[:, j]`."""
        curvature = self.probabilities @ self.weight.square() - self.expected.square()
        return RiskRows(self.values, self.gradient, curvature.clamp_min(0), len(self.values), "exact")

    def curvature(self) -> Curvature:
        """Means over the samples, cross-unit terms included; H_s = Wᵀ (diag p - p pᵀ) W."""
        p, a, n = self.probabilities, self.values, len(self.values)
        spread = torch.diag(p.sum(0)) - p.T @ p  # [K, K]
        hessian = self.weight.T @ spread @ self.weight / n
        mixed = self.weight.T @ ((p.T @ a) * self.weight - p.T @ (a * self.expected)) / n
        power = (self.rows().curvature * a.square()).mean(0)
        gradient = self.gradient
        return Curvature(gradient.mean(0), (gradient * a).mean(0), hessian, mixed, power, "exact")


def _check_labels(labels: Tensor | None, images: int, classes: int) -> None:
    if labels is None or len(labels) != images or labels.is_floating_point():
        raise InputError("labels: cmr_const and cmr_affine need one class label (int64) for each calibration image")
    if int(labels.max()) >= classes or int(labels.min()) < 0:
        raise InputError(f"labels: {int(labels.max())} is no class of a head with {classes} outputs")
