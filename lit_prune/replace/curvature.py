"""Second-order replacement risk: gradients and curvature of the loss in the values that a layer reads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.layers import Batches
from lit_prune.measurement.passes import InputGradients, collect
from lit_prune.replace.patches import channel_dim
from lit_prune.task import Task, settle


@dataclass(frozen=True)
class Curvature:
    """Means over images of products of gradients, for the input channels of one layer.

    With g_p the gradient of the loss in a channel's value a_p at position p: `G = Σ_p g_p`, `v = Σ_p g_p·a_p`.
    A constant c in place of the channel changes the loss by `c·G - v` to first order. The curvature is Gauss-Newton:
    the mean over targets drawn from the network's own distribution, or over random projections of the prediction where
    the loss is no likelihood (`Task.curvature_terms`). It is the exact Hessian where the logits are affine in the
    values, as in a linear softmax head.

    Attributes:
        gradient: E G of the loss, float64 [C].
        product: E v of the loss, [C].
        hessian: E G Gᵀ of the curvature's terms, [C, C].
        mixed: E G vᵀ of them, [C, C].
        power: E v² of them, [C].
        method: "exact", "gauss_newton" or "hutchinson" (diagonals only).
    """

    gradient: Tensor
    product: Tensor
    hessian: Tensor
    mixed: Tensor
    power: Tensor
    method: str = "gauss_newton"

    def without_gradient(self) -> "Curvature":
        """The same with every sample's gradient taken as zero (lemma 1, condition i).

        Constants are then curvature-weighted means, scores `½ min_c E h (a - c)²`. In a trained network h is tiny
        wherever the network is sure, so the gradient correction `ḡ/h̄` of equation 7 leaves the range of the values:
        the second-order proxy is read far outside of where it holds.

        Source: causal mechanism reduction, section A.2; our reading of cwvar in tables 5 and 6.
        """
        return replace(self, gradient=torch.zeros_like(self.gradient), product=torch.zeros_like(self.product))

    def constants(self) -> Tensor:
        """Best constant of each channel alone, `(hᵀa - 1ᵀg)/(1ᵀh)`; 0 where there is no curvature, [C].

        Source: causal mechanism reduction, equation 7.
        """
        curved = self.hessian.diagonal() > 0
        wanted = self.mixed.diagonal() - self.gradient
        return torch.where(curved, wanted / torch.where(curved, self.hessian.diagonal(), 1), 0)

    def scores(self) -> Tensor:
        """Rise of the loss when each channel alone takes its best constant, [C], nats.

        Source: causal mechanism reduction, equation 9.
        """
        wanted = self.mixed.diagonal() - self.gradient
        return 0.5 * self.power - self.product - 0.5 * wanted * self.constants()

    def joint_constants(self, replaced: Sequence[int], ridge: float = 1e-6) -> Tensor:
        """Best constants when all of `replaced` go at once, [len(replaced)]: the cross-unit curvature counted.

        Solves `H_SS c = E[G (Σ_S v)] - E[G]`.

        Args:
            replaced: channels.
            ridge: relative to the mean of H's diagonal, towards the constants that each channel would have alone.

        Raises:
            InputError: only diagonals were estimated.
        """
        if self.method == "hutchinson":
            raise InputError("objective='joint_loss' needs cross-unit curvature; use curvature='gauss_newton'")
        chosen = list(replaced)
        hessian = self.hessian[chosen][:, chosen]
        wanted = self.mixed[chosen][:, chosen].sum(1) - self.gradient[chosen]
        alone = self.constants()[chosen]
        loading = (ridge * hessian.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
        change = torch.linalg.solve(hessian + loading * torch.eye(len(chosen)).to(hessian), wanted - hessian @ alone)
        return alone + change

    def risk(self, replaced: Sequence[int], constants: Tensor) -> float:
        """Second-order rise of the loss when `replaced` take `constants`, up to the term that no constant changes.

        Args:
            replaced: channels.
            constants: [len(replaced)].
        """
        chosen = list(replaced)
        hessian = self.hessian[chosen][:, chosen]
        wanted = self.mixed[chosen][:, chosen].sum(1) - self.gradient[chosen]
        return float(0.5 * constants @ hessian @ constants - constants @ wanted)

    def off_diagonal_ratio(self, block: int = 32, blocks: int = 50, seed: int = 0) -> float:
        """Mean over seeded blocks of `‖H_B - diag(H_B)‖_F / ‖H_B‖_F`; 0 for a block without curvature.

        Args:
            block: channels in a block (all of them where there are fewer).
            blocks: how many blocks.
            seed: of the blocks.

        Source: causal mechanism reduction, proposition 5.
        """
        generator = torch.Generator().manual_seed(seed)
        ratios = []
        for _ in range(blocks):
            chosen = torch.randperm(len(self.hessian), generator=generator)[:block]
            part = self.hessian[chosen][:, chosen]
            norm = part.norm()
            ratios.append(float((part - part.diagonal().diag()).norm() / norm) if norm > 0 else 0.0)
        return sum(ratios) / len(ratios)


class Part(NamedTuple):
    """Values of each sample to differentiate, [B], their weights [B], and whether they are the loss itself."""

    values: Tensor
    weights: Tensor
    is_loss: bool


def loss_parts(task: Task, output: Any, batch: Any, generator: torch.Generator) -> list[Part]:
    """The loss with weight 1, then the terms of its curvature.

    Raises:
        InputError: the task has no loss, or the batch no target.
    """
    losses = task.losses(output, batch)
    terms = task.curvature_terms(output, batch, generator)
    return [Part(losses, torch.ones_like(losses.detach()), True), *(Part(v, w, False) for v, w in terms)]


class CurvatureSums(InputGradients):
    """Collects the curvature of the mean loss in the input channels of each layer.

    Layers may lie behind each other: each is differentiated with the others left alone.
    """

    losses = True

    def __init__(self, model: nn.Module, layers: Sequence[str], task: Task, seed: int = 0) -> None:
        super().__init__(model, layers, seed)
        self.task = task
        self.sums: dict[str, list[Tensor]] = {}
        self.count = 0

    def add(self, output: Any, batch: Any) -> None:
        """See `passes.Collector`."""
        size = self.task.size(batch)
        for part in loss_parts(self.task, output, batch, self.generator):
            for name, gradients in self.gradients_of(part.values).items():
                values, slopes = (channel_rows(self.model, name, rows, size) for rows in (self.inputs[name], gradients))
                self._add(name, values, slopes, part)
        self.inputs.clear()
        self.count += size

    def _add(self, name: str, a: Tensor, g: Tensor, part: Part) -> None:
        """Adds the products of one part's gradients; values and gradients are [B, P, C]."""
        total, product = g.sum(1).cpu(), (g * a).sum(1).cpu()  # G, v: [B, C]
        wide, weights = total.shape[1], part.weights.double().cpu()[:, None]
        if name not in self.sums:
            shapes = [(wide,), (wide,), (wide, wide), (wide, wide), (wide,)]
            self.sums[name] = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
        sums = self.sums[name]
        if part.is_loss:
            sums[0] += (weights * total).sum(0)
            sums[1] += (weights * product).sum(0)
        else:
            weighted = (weights * total).T
            sums[2].addmm_(weighted, total)
            sums[3].addmm_(weighted, product)
            sums[4] += (weights * product.square()).sum(0)

    def result(self) -> dict[str, Curvature]:
        """Layer -> means over the images; the sums are used up."""
        found = {}
        while self.sums:
            name, totals = self.sums.popitem()
            first, product, square, mixed, diagonal = (total.div_(self.count) for total in totals)
            found[name] = Curvature(first, product, square, mixed, diagonal)
        return dict(reversed(found.items()))


def measure_curvature(
    model: nn.Module, layers: Sequence[str], batches: Batches, seed: int = 0, task: Task | str | None = None
) -> dict[str, Curvature]:
    """`CurvatureSums` over batches; the model is left as found. InputError: no images, or no targets."""
    task, batches = settle(task, model, batches)
    return collect(model, batches, CurvatureSums(model, layers, task, seed), task)


def channel_rows(model: nn.Module, layer: str, calls: Sequence[Tensor], samples: int) -> Tensor:
    """What a layer read in its calls, or tensors shaped like it, as float64 [B, P, C], detached.

    Several calls, and rows that are windows or boxes of a sample, count as positions of the sample.

    Raises:
        InputError: rows that do not belong to samples evenly.
    """
    dim = channel_dim(model.get_submodule(layer))
    uneven = next((value for value in calls if len(value) % samples), None)
    if uneven is not None:
        raise InputError(
            f"layers: {layer!r} reads {len(uneven)} rows for {samples} samples, so it is not known which belong to "
            "which; use batches of one sample"
        )
    rows = [v.detach().double().movedim(dim, -1).reshape(samples, -1, v.shape[dim]) for v in calls]
    return torch.cat(rows, 1)


class HutchinsonSums(InputGradients):
    """Collects curvature with the Hessian's diagonal estimated by Rademacher probes of whole channels.

    With ε = ±1 a channel and image, `ε_j Σ_p (H (ε ⊗ 1))_jp` has the mean Σ_pq H_jp,jq, and with `ε ⊗ a` in the place
    of `ε ⊗ 1` the terms that carry activations follow. The estimate is unbiased and may be negative; cross-unit terms
    are not estimated, so these objects have no joint constants.
    """

    losses = True

    def __init__(self, model: nn.Module, layers: Sequence[str], task: Task, seed: int = 0, probes: int = 8) -> None:
        super().__init__(model, layers, seed)
        self.task = task
        self.probes = probes
        self.sums: dict[str, list[Tensor]] = {}
        self.count = 0

    def add(self, output: Any, batch: Any) -> None:
        """See `passes.Collector`."""
        size = self.task.size(batch)
        for name, gradients in self.gradients_of(self.task.losses(output, batch), create_graph=True).items():
            for inputs, gradient in zip(self.inputs[name], gradients, strict=True):
                part = self._batch_sums(name, inputs, gradient, size)
                known = self.sums.get(name)
                self.sums[name] = part if known is None else [a + b for a, b in zip(known, part, strict=True)]
        self.inputs.clear()
        self.count += size

    def _batch_sums(self, name: str, inputs: Tensor, gradient: Tensor, size: int) -> list[Tensor]:
        """Sums over the batch of G, v and the three diagonals, each float64 [C]."""

        def pooled(values: Tensor) -> Tensor:
            return channel_rows(self.model, name, [values], size).sum(1).cpu()

        dim = channel_dim(self.model.get_submodule(name))
        found = [pooled(gradient).sum(0), pooled(gradient * inputs).sum(0)]
        hessian, mixed, power = (torch.zeros_like(found[0]) for _ in range(3))
        shape = [1] * inputs.dim()
        shape[0], shape[dim] = len(inputs), inputs.shape[dim]
        for _ in range(self.probes):
            signs = (torch.randint(2, shape, generator=self.generator) * 2 - 1).to(inputs)
            plain = _product(gradient, inputs, signs.expand_as(inputs))
            valued = _product(gradient, inputs, signs * inputs.detach())
            hessian += pooled(signs * plain).sum(0) / self.probes
            mixed += pooled(signs * valued).sum(0) / self.probes
            power += pooled(signs * valued * inputs).sum(0) / self.probes
        return [*found, hessian, mixed, power]

    def result(self) -> dict[str, Curvature]:
        """Layer -> means over the images, diagonals only."""
        found = {}
        for name, totals in self.sums.items():
            gradient, product, hessian, mixed, power = (total / self.count for total in totals)
            found[name] = Curvature(gradient, product, hessian.diag(), mixed.diag(), power, "hutchinson")
        return found


def _product(gradient: Tensor, inputs: Tensor, direction: Tensor) -> Tensor:
    """H · direction; zero where the gradient does not depend on the inputs."""
    if not gradient.requires_grad:
        return torch.zeros_like(inputs)
    found = torch.autograd.grad(gradient, inputs, direction, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(inputs) if found is None else found
