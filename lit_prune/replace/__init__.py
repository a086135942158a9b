"""Mechanism replacement: something in the place of what is removed, compiled into a smaller dense network."""

from lit_prune.replace.certificate import Certificate, certify
from lit_prune.replace.curvature import Curvature, measure_curvature
from lit_prune.replace.interchange import Interchange, interchange, paired_bootstrap
from lit_prune.replace.pairs import Swaps
from lit_prune.replace.reconstruction import reconstruction_costs
from lit_prune.replace.replacement import Reduced, replace_mechanisms
from lit_prune.replace.settings import KINDS, Replacement

__all__ = [
    "KINDS",
    "Certificate",
    "Curvature",
    "Interchange",
    "Reduced",
    "Replacement",
    "Swaps",
    "certify",
    "interchange",
    "measure_curvature",
    "paired_bootstrap",
    "reconstruction_costs",
    "replace_mechanisms",
]
