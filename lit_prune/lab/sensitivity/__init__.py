"""One layer at a time at several widths: where a network has slack."""

from lit_prune.lab.sensitivity.table import Asked, sensitivity

__all__ = ["Asked", "sensitivity"]
