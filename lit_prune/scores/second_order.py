"""The affine score of causal mechanism reduction."""

from torch import Tensor

from lit_prune.replace.affine_score import affine_risks
from lit_prune.scores.evidence import Evidence
from lit_prune.scores.outputs import summed_over_readers


def cmr_affine(evidence: Evidence, parents: float, ridge: float, rule: str) -> dict[str, Tensor]:
    """Rise of the loss, to second order, when a unit becomes its best affine function of r others, in nats.

    `affine_risks` with the Gauss-Newton curvature of the loss in the value that a reader is given, summed over
    the readers. Positions count as independent and are sampled (at most 8 an image, 4096 a layer). Per group, as
    `variance`.

    Args:
        evidence: network and labelled data.
        parents: r, at most all others.
        ridge: relative to each parent's own weighted variance.
        rule: who the parents are: the best by `pearson` correlation, by `weighted_pearson` (correlation times the
            cosine of the outgoing weights, both absolute; of an ungrouped reader), or `random` ones.

    Raises:
        InputError: as `affine_risks`.

    Source: causal mechanism reduction, affine case of theorem 1.
    """
    values = {}
    for reader, rows in evidence.collected("risk_rows").items():
        module = evidence.model.get_submodule(reader)
        grouped = rule == "weighted_pearson" and getattr(module, "groups", 1) > 1
        fitting = "pearson" if grouped else rule
        values[reader] = affine_risks(rows, module.weight, parents, ridge, fitting, evidence.seed)
    return summed_over_readers(evidence, values)
