"""The lab's sections of the report page: importing this module registers them."""

from lit_prune.lab.analyze import figures as analyze
from lit_prune.lab.lesion import figures as lesion
from lit_prune.lab.lesion import report_tables as lesion_tables
from lit_prune.lab.reduce import figures as reduce
from lit_prune.lab.sensitivity import figures as sensitivity
from lit_prune.lab.sweep import figures as sweep

__all__ = ["analyze", "lesion", "lesion_tables", "reduce", "sensitivity", "sweep"]
