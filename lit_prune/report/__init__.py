"""What a run shows: one self-contained page of figures and tables, and the result table for the terminal."""

from lit_prune.registry import import_files
from lit_prune.report.page import write_report
from lit_prune.report.tables import result_table
from lit_prune.report.verdict import terminal_verdict

__all__ = ["result_table", "terminal_verdict", "write_report"]

import_files(__file__, __package__)
