"""Scores from loss gradients at a layer's output."""

import torch
from torch import Tensor, nn

from lit_prune.activations import position_view
from lit_prune.errors import InputError
from lit_prune.layers import removing, to_model, undisturbed
from lit_prune.scores.evidence import Evidence


def taylor(evidence: Evidence) -> dict[str, Tensor]:
    """Mean over images of |Σ_p a_i·∂L/∂a_i|, a the raw output, L the image's cross-entropy (Molchanov et al. 2017).

    The sum runs over all positions (all tokens of a token layer). Evaluation mode, so that images are independent;
    parameters get no gradient. Layers that the loss does not depend on get 0.

    Raises:
        InputError: a loss that is not finite.
    """
    totals = {name: torch.zeros(len(module.weight), dtype=torch.float64) for name, module in evidence.layers.items()}
    outputs: list[tuple[str, Tensor]] = []
    count = 0

    def keeper(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            outputs.append((name, output))
            return output.clone()  # what follows may overwrite its input in place

        return hook

    handles = [module.register_forward_hook(keeper(name)) for name, module in evidence.layers.items()]
    with removing(handles), undisturbed(evidence.model, gradients=True):
        for images, labels in evidence.batches:
            outputs.clear()
            for name, saliency in _batch_saliency(evidence, images, labels, outputs):
                totals[name] += saliency
            count += len(images)
    if not count:
        raise InputError("batches: no batch of (images, labels) in it; give at least one")
    return {name: total / count for name, total in totals.items()}


def _batch_saliency(
    evidence: Evidence, images: Tensor, labels: Tensor, outputs: list[tuple[str, Tensor]]
) -> list[tuple[str, Tensor]]:
    """Σ over the batch of |Σ_p a·∂L/∂a|, float64 [N], for each output that the hooks have put in `outputs`."""
    images = to_model(evidence.model, images).clone().requires_grad_()  # frozen networks have a gradient too
    logits = evidence.model(images)
    loss = nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum")
    if not torch.isfinite(loss):
        raise InputError("batches: the loss is NaN or infinite; mend the network or the data")
    gradients = torch.autograd.grad(loss, [output for _, output in outputs], allow_unused=True)
    found = []
    for (name, output), gradient in zip(outputs, gradients, strict=True):
        if gradient is not None:
            product = position_view(evidence.layers[name], output.detach() * gradient, token=None)
            found.append((name, product.float().sum(1).abs().sum(0).double().cpu()))
    return found
