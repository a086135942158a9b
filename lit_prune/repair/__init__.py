"""Repair after surgery: BatchNorm recalibration and distillation from the dense teacher."""

from lit_prune.repair.batchnorm import recalibrate_batchnorm
from lit_prune.repair.distillation import Distillation, Repair

__all__ = ["Distillation", "Repair", "recalibrate_batchnorm"]
