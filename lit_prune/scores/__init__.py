"""Channel scores: higher = keep."""

from lit_prune.scores.evidence import Evidence
from lit_prune.scores.method import Method, Score, register_score
from lit_prune.scores.planning import mask_method, plan_method
from lit_prune.scores.table import SCORES, find_score, score

__all__ = [
    "SCORES",
    "Evidence",
    "Method",
    "Score",
    "find_score",
    "mask_method",
    "plan_method",
    "register_score",
    "score",
]
