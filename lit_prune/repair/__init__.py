"""Repair after surgery: BatchNorm recalibration and distillation from the dense teacher."""

from lit_prune.repair.batchnorm import recalibrate_batchnorm
from lit_prune.repair.distillation import Distillation, Repair
from lit_prune.repair.teaching import Teaching

__all__ = ["Distillation", "Repair", "Teaching", "recalibrate_batchnorm"]
