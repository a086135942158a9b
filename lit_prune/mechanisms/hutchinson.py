"""Diagonal curvature by random probes: the true Hessian where Gauss-Newton leaves a part of it out."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_prune.layers import Batches, removing, to_model, undisturbed
from lit_prune.mechanisms.curvature import Curvature, label_parts
from lit_prune.mechanisms.patches import channel_dim


def hutchinson_curvature(
    model: nn.Module, layers: Sequence[str], batches: Batches, probes: int = 8, seed: int = 0
) -> dict[str, Curvature]:
    """Curvature with the Hessian's diagonal estimated by Rademacher probes of whole channels.

    With ε = ±1 a channel and image, `ε_j Σ_p (H (ε ⊗ 1))_jp` has the mean Σ_pq H_jp,jq, and with `ε ⊗ a` in the place
    of `ε ⊗ 1` the terms that carry activations follow. The estimate is unbiased and may be negative; cross-unit terms
    are not estimated, so these objects have no joint constants.

    Args:
        model: any classifier; left as found.
        layers: names of convolutions and linear layers.
        batches: (images, labels).
        probes: per image.
        seed: of the probes.
    """
    inputs: dict[str, Tensor] = {}
    sums: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)

    def keeper(name: str):
        return lambda module, args: inputs.__setitem__(name, args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(keeper(name)) for name in layers]
    count = 0
    with removing(handles), undisturbed(model, gradients=True):
        for images, labels in batches:
            logits = model(to_model(model, images).clone().requires_grad_())
            true = label_parts(logits, labels, generator)[0].values
            loss = F.cross_entropy(logits, true, reduction="sum")
            gradients = torch.autograd.grad(loss, [inputs[name] for name in layers], create_graph=True)
            for name, gradient in zip(layers, gradients, strict=True):
                dim = channel_dim(model.get_submodule(name))
                part = _batch_sums(inputs[name], gradient, dim, probes, generator)
                sums[name] = [old + new for old, new in zip(sums[name], part, strict=True)] if name in sums else part
            count += len(images)
    return {name: _curvature([total / count for total in totals]) for name, totals in sums.items()}


def _batch_sums(inputs: Tensor, gradient: Tensor, dim: int, probes: int, generator: torch.Generator) -> list[Tensor]:
    """Sums over the batch of G, v and the three diagonals, each float64 [C]."""

    def pooled(values: Tensor) -> Tensor:
        return values.detach().double().movedim(dim, -1).reshape(len(values), -1, values.shape[dim]).sum(1).cpu()

    found = [pooled(gradient).sum(0), pooled(gradient * inputs).sum(0)]
    hessian, mixed, power = (torch.zeros_like(found[0]) for _ in range(3))
    shape = [1] * inputs.dim()
    shape[0], shape[dim] = len(inputs), inputs.shape[dim]
    for _ in range(probes):
        signs = (torch.randint(2, shape, generator=generator) * 2 - 1).to(inputs)
        plain = _product(gradient, inputs, signs.expand_as(inputs))
        valued = _product(gradient, inputs, signs * inputs.detach())
        hessian += pooled(signs * plain).sum(0) / probes
        mixed += pooled(signs * valued).sum(0) / probes
        power += pooled(signs * valued * inputs).sum(0) / probes
    return [*found, hessian, mixed, power]


def _product(gradient: Tensor, inputs: Tensor, direction: Tensor) -> Tensor:
    """H · direction; zero where the gradient does not depend on the inputs."""
    if not gradient.requires_grad:
        return torch.zeros_like(inputs)
    found = torch.autograd.grad(gradient, inputs, direction, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(inputs) if found is None else found


def _curvature(means: list[Tensor]) -> Curvature:
    gradient, product, hessian, mixed, power = means
    return Curvature(gradient, product, hessian.diag(), mixed.diag(), power, "hutchinson")
