"""Mechanism replacement: something in the place of what is removed, compiled into a smaller dense network."""

from lit_prune.mechanisms.reconstruction import reconstruction_costs
from lit_prune.mechanisms.replacement import Reduced, replace_mechanisms
from lit_prune.mechanisms.settings import KINDS, Replacement

__all__ = ["KINDS", "Reduced", "Replacement", "reconstruction_costs", "replace_mechanisms"]
