"""Scores from loss gradients at a layer's output."""

from torch import Tensor

from lit_prune.scores.evidence import Evidence


def taylor(evidence: Evidence) -> dict[str, Tensor]:
    """Mean over images of |Σ_p a_i·∂L/∂a_i|, a the raw output, L the image's loss (Molchanov et al. 2017).

    The sum runs over all positions (all tokens of a token layer). Evaluation mode, so that images are independent;
    parameters get no gradient. Layers that the loss does not depend on get 0.

    Raises:
        InputError: a loss that is not finite.
    """
    return evidence.collected("saliency")
