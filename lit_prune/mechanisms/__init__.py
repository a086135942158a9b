"""Mechanism replacement: something in the place of what is removed, compiled into a smaller dense network."""

from lit_prune.mechanisms.certificate import Certificate, certify
from lit_prune.mechanisms.curvature import Curvature, measure_curvature
from lit_prune.mechanisms.interchange import Interchange, Swaps, interchange, paired_bootstrap
from lit_prune.mechanisms.invariance import Stress, kept_jaccard, rescale_units, rescaling_stress
from lit_prune.mechanisms.reconstruction import reconstruction_costs
from lit_prune.mechanisms.replacement import Reduced, replace_mechanisms
from lit_prune.mechanisms.settings import KINDS, Replacement

__all__ = [
    "KINDS",
    "Certificate",
    "Curvature",
    "Interchange",
    "Reduced",
    "Replacement",
    "Stress",
    "Swaps",
    "certify",
    "interchange",
    "kept_jaccard",
    "measure_curvature",
    "paired_bootstrap",
    "reconstruction_costs",
    "replace_mechanisms",
    "rescale_units",
    "rescaling_stress",
]
