"""Lightning callbacks of lit_prune."""

from callbacks.axis_trace import AxisTrace
from callbacks.decorrelation import Decorrelation
from callbacks.gradient_trace import GradientTrace
from callbacks.staged_pruning import StagedPruning

__all__ = ["AxisTrace", "Decorrelation", "GradientTrace", "StagedPruning"]
