"""Diagonal curvature by random probes: the true Hessian where Gauss-Newton leaves a part of it out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.measurement.passes import InputGradients
from lit_prune.replace.curvature import Curvature, channel_rows
from lit_prune.replace.patches import channel_dim
from lit_prune.task import Task


class HutchinsonSums(InputGradients):
    """Collects curvature with the Hessian's diagonal estimated by Rademacher probes of whole channels.

    With ε = ±1 a channel and image, `ε_j Σ_p (H (ε ⊗ 1))_jp` has the mean Σ_pq H_jp,jq, and with `ε ⊗ a` in the place
    of `ε ⊗ 1` the terms that carry activations follow. The estimate is unbiased and may be negative; cross-unit terms
    are not estimated, so these objects have no joint constants.

    Args:
        model: any network.
        layers: names of convolutions and linear layers.
        task: what the loss is.
        seed: of the probes.
        probes: per image.
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
