"""Lightning callbacks of lit_prune."""

from callbacks.axis_trace import AxisTrace
from callbacks.staged_pruning import StagedPruning

__all__ = ["AxisTrace", "StagedPruning"]
