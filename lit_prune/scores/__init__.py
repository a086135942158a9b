"""Channel scores: higher = keep."""

from lit_prune.scores.evidence import Evidence
from lit_prune.scores.method import SCORES, Method, Score, find_score, register_score, score
from lit_prune.scores.planning import mask_method, plan_method

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
