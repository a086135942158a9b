"""Second-order replacement risk sample by sample: what affine stand-ins are fitted to when the loss is the measure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.passes import InputGradients
from lit_prune.replace.curvature import Curvature, loss_parts
from lit_prune.replace.patches import PositionSample, output_rows
from lit_prune.task import Task

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


class RiskSamples(InputGradients):
    """Values, gradients and Gauss-Newton curvature of the loss at the input of every layer that is named.

    The curvature is that of `Task.curvature_terms`. Positions count as independent (the diagonal approximation); where
    there are many, a seeded sample of each image is taken, and
    `RiskRows.images` is scaled so that sums over rows estimate sums over all positions.

    Args:
        model: any network.
        layers: names of convolutions and linear layers.
        task: what the loss is.
        seed: of what is drawn.
        per_image: most positions of an image.
        most_rows: images beyond these many samples of a layer are not differentiated.
    """

    losses = True

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        task: Task,
        seed: int = 0,
        per_image: int = 8,
        most_rows: int = 4096,
    ) -> None:
        super().__init__(model, layers, seed)
        self.task = task
        self.most_rows = most_rows
        self.modules = {name: model.get_submodule(name) for name in layers}
        self.parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.images: dict[str, float] = {}
        self.sample = PositionSample(per_image, seed)

    def add(self, output: Any, batch: Any) -> None:
        """See `passes.Collector`."""
        taken = {name: sum(len(part[0]) for part in parts) for name, parts in self.parts.items()}
        size = self.task.size(batch)
        wanted = [name for name in self.inputs if taken.get(name, 0) < self.most_rows]
        if not wanted:
            self.inputs.clear()
            return
        chosen = {name: [self._draw(name, v, size, not k) for k, v in enumerate(self.inputs[name])] for name in wanted}
        values = {name: self._rows(name, self.inputs[name], chosen[name]) for name in wanted}
        gradient = {name: torch.zeros_like(rows) for name, rows in values.items()}
        curvature = {name: torch.zeros_like(rows) for name, rows in values.items()}
        for part in loss_parts(self.task, output, batch, self.generator):
            gradients = self.gradients_of(part.values)
            for name in wanted:
                rows = self._rows(name, gradients[name], chosen[name])
                if part.is_loss:
                    gradient[name] = rows
                else:
                    curvature[name] += self._weights(name, part.weights, chosen[name])[:, None] * rows.square()
        for name in wanted:
            part_of = (values[name].cpu(), gradient[name].cpu(), curvature[name].cpu())
            self.parts.setdefault(name, []).append(part_of)
        self.inputs.clear()

    def _draw(self, name: str, inputs: Tensor, size: int, first: bool) -> Tensor | None:
        """Sampled positions; counts the images at the first call, less by the share of positions left out."""
        width = inputs.shape[-1 if isinstance(self.modules[name], nn.Linear) else 1]
        positions = inputs.numel() // len(inputs) // width
        chosen = self.sample.draw(len(inputs), positions)
        share = 1.0 if chosen is None else chosen.shape[1] / positions
        self.images[name] = self.images.get(name, 0.0) + (share * size if first else 0.0)
        return chosen

    def _rows(self, name: str, calls: Sequence[Tensor], chosen: Sequence[Tensor | None]) -> Tensor:
        """Values at the sampled positions of all calls, float64 [rows, C]."""
        pairs = zip(calls, chosen, strict=True)
        return torch.cat([output_rows(self.modules[name], v.detach(), places).double() for v, places in pairs])

    def _weights(self, name: str, weights: Tensor, chosen: Sequence[Tensor | None]) -> Tensor:
        """The samples' weights at the rows of `_rows`."""
        lengths = (len(self._rows(name, [v], [p])) for v, p in zip(self.inputs[name], chosen, strict=True))
        return torch.cat([weights.double().repeat_interleave(length // len(weights)) for length in lengths])

    def result(self) -> dict[str, RiskRows]:
        """Layer -> samples."""
        found = {}
        for name, parts in self.parts.items():
            values, gradient, curvature = (torch.cat(column) for column in zip(*parts, strict=True))
            found[name] = RiskRows(values, gradient, curvature, self.images[name], "gauss_newton")
        return found
