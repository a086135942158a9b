"""Lightning callbacks of lit_prune, under the names that configurations of a clone may use."""

from lit_prune import AxisTrace, Decorrelation, GradientTrace, StagedPruning

__all__ = ["AxisTrace", "Decorrelation", "GradientTrace", "StagedPruning"]
