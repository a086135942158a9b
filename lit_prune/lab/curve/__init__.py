"""The figure at several budgets and after growing repair, against the seconds that it took."""

from lit_prune.lab.curve.table import CurveRequest, curve

__all__ = ["CurveRequest", "curve"]
