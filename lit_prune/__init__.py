"""Train a vision network, watch what its channels are for, prune it in stages, repair it, hand over a smaller one."""

from lit_prune.measure import measure
from lit_prune.mechanisms import interchange, replace_mechanisms
from lit_prune.repair import recalibrate_batchnorm
from lit_prune.scores import score
from lit_prune.structure import Plan, apply_plan, cost, load_compact, make_plan, save_compact

__all__ = [
    "Plan",
    "apply_plan",
    "cost",
    "interchange",
    "load_compact",
    "make_plan",
    "measure",
    "recalibrate_batchnorm",
    "replace_mechanisms",
    "save_compact",
    "score",
]
