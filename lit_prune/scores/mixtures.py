"""Scores made of other scores."""

from torch import Tensor

from lit_prune.scores.arrangement import follow
from lit_prune.scores.evidence import Evidence
from lit_prune.scores.method import Method
from lit_prune.scores.units import to_layers, unit_means


def hybrid(evidence: Evidence, budgets: Method, order: Method) -> dict[str, Tensor]:
    """How many channels a layer loses from one score, which ones from another.

    The values of `budgets` inside each coupled group, dealt out in the order of `order`: any global threshold, under
    any normalisation, cuts each group to the width that `budgets` gives it, and inside keeps what `order` ranks best.
    Under uniform or given budgets it is `order` alone.

    Source: the two-axis paper, appendix C (budgets `taylor`, ranks `composite_ix`).
    """
    sizes, ranks = (unit_means(evidence, method.ranks(evidence)) for method in (budgets, order))
    dealt = {group: follow(sizes[group], ranks[group].argsort(stable=True)) for group in sizes if group in ranks}
    return to_layers(evidence, dealt)
