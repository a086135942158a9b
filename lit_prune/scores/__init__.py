"""Channel scores: higher = keep."""

from lit_prune.scores.table import SCORES, Score, score

__all__ = ["SCORES", "Score", "score"]
