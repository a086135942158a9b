"""The affine score of causal mechanism reduction."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.mechanisms.risk import weighted_affine
from lit_prune.mechanisms.stand_ins import correlations
from lit_prune.scores.evidence import Evidence
from lit_prune.scores.outputs import summed_over_readers

PARENT_RULES = ("pearson", "weighted_pearson", "random")


def cmr_affine(evidence: Evidence, parents: float, ridge: float, rule: str) -> dict[str, Tensor]:
    """Rise of the loss, to second order, when a unit becomes its best affine function of r others, in nats.

    min over θ of the mean over images of Σ_p g_p(Φθ - a)_p + ½ h_p (Φθ - a)_p², g the gradient and h the Gauss-Newton
    curvature of the cross-entropy in the value a that a reader is given, Φ a constant and the parents' values; summed
    over the readers. Positions count as independent and are sampled (at most 8 an image, 4096 a layer). Per group, as
    `variance`.

    Args:
        evidence: network and labelled data.
        parents: r, at most all others.
        ridge: relative to the mean diagonal of the parents' weighted covariance.
        rule: who the parents are: the best by `pearson` correlation, by `weighted_pearson` (correlation times the
            cosine of the outgoing weights, both absolute), or `random` ones.

    Raises:
        InputError: an unknown rule, parents that are no whole number of at least 0, a negative ridge.

    Source: causal mechanism reduction, affine case of theorem 1.
    """
    if rule not in PARENT_RULES:
        raise InputError(f"score: cmr_affine has no parent rule {rule!r}; use one of {', '.join(PARENT_RULES)}")
    if parents < 0 or parents != int(parents) or ridge < 0:
        raise InputError(f"score: cmr_affine({parents:g}, {ridge:g}): parents is a whole number, neither below 0")
    values = {}
    for reader, rows in evidence.collected("risk_rows").items():
        chosen = _parents(rows.values, evidence.model.get_submodule(reader), int(parents), rule, evidence.seed)
        values[reader] = weighted_affine(rows, range(rows.values.shape[1]), chosen, ridge).risk
    return summed_over_readers(evidence, values)


def _parents(values: Tensor, module: nn.Module, count: int, rule: str, seed: int) -> Tensor:
    """The channels that stand in for each, int64 [C, r]."""
    channels = values.shape[1]
    every = list(range(channels))
    if rule == "random":
        strength = torch.rand(channels, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    else:
        strength = correlations(torch.cov(values.T, correction=0).reshape(channels, channels), every, every)
    if rule == "weighted_pearson" and getattr(module, "groups", 1) == 1:
        columns = F.normalize(module.weight.detach().double().cpu().movedim(1, 0).flatten(1), dim=1)  # [C, O·taps]
        strength = strength * (columns @ columns.T).abs()
    strength.fill_diagonal_(-1)
    return strength.topk(min(count, channels - 1), dim=1).indices
