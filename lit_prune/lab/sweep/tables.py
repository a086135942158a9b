"""The tables of a sweep: one row a cell, and what is derived from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lit_prune.errors import InputError
from lit_prune.files import write_parquet
from lit_prune.lab.sweep import statistics
from lit_prune.lab.sweep.request import SweepRequest

DERIVED = ("auc", "gaps", "signs", "selector", "weights", "recovery", "rules")


def derive_tables(cells: pd.DataFrame, request: SweepRequest) -> tuple[dict[str, pd.DataFrame], list[InputError]]:
    """The derived tables by name, and why some cannot be made.

    Args:
        cells: one row a cell, see `sweep.parquet`.
        request: says which methods are compared with each other.
    """
    curves = statistics.accuracy_curves(cells)
    tables, reasons = {"recovery": statistics.recovery_budgets(cells)}, []

    def attempt(name: str, make: Callable[[], pd.DataFrame]) -> None:
        try:
            tables[name] = make()
        except InputError as error:
            reasons.append(error)

    if len(request.sparsities) < 2:
        return tables, reasons  # points, not curves
    attempt("auc", lambda: statistics.areas(curves, request.methods))
    attempt("weights", lambda: statistics.weight_sweeps(curves))
    attempt("rules", lambda: statistics.rule_ablation(curves, request.methods))
    if "auc" in tables:
        tables["gaps"] = statistics.gaps(tables["auc"])
        tables["signs"] = statistics.sign_summary(tables["gaps"])
        tables["selector"] = statistics.select_leave_one_out(tables["auc"])
    return tables, reasons


def write_derived(folder: Path, tables: dict[str, pd.DataFrame]) -> None:
    """Writes the derived tables and removes those of an earlier sweep that this one does not have."""
    for name in DERIVED:
        if name in tables and len(tables[name]):
            write_parquet(folder / f"{name}.parquet", tables[name])
        else:
            (folder / f"{name}.parquet").unlink(missing_ok=True)
