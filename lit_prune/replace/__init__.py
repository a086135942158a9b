"""Mechanism replacement: something in the place of what is removed, compiled into a smaller dense network."""

from lit_prune.registry import import_files
from lit_prune.replace.certificate import Certificate, certify
from lit_prune.replace.curvature import Curvature, measure_curvature
from lit_prune.replace.interchange import Interchange, interchange, paired_bootstrap
from lit_prune.replace.methods import STAND_INS, Replacement, StandInMethod, find_stand_in, register_stand_in
from lit_prune.replace.pairs import Swaps
from lit_prune.replace.reconstruction import reconstruction_costs
from lit_prune.replace.replacement import Reduced, replace_mechanisms

__all__ = [
    "STAND_INS",
    "Certificate",
    "Curvature",
    "Interchange",
    "Reduced",
    "Replacement",
    "StandInMethod",
    "Swaps",
    "certify",
    "find_stand_in",
    "interchange",
    "measure_curvature",
    "paired_bootstrap",
    "reconstruction_costs",
    "register_stand_in",
    "replace_mechanisms",
]

import_files(__file__, __package__)
