"""The tables of a sweep: one row a cell, and what is derived from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

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


def area_rows(aucs: pd.DataFrame) -> Table:
    """Areas under the curves for the terminal: one row a method, one column a setting, best first."""
    found = statistics.summarise(aucs, [*statistics.SETTING, "method", "axis"], "auc")
    settings = found[statistics.SETTING].drop_duplicates().to_records(index=False).tolist()
    table = _table("Accuracy over MACs removed (AUC)", ("axis", "method"), settings)
    order = found.groupby("method")["mean"].mean().sort_values(ascending=False).index
    by = found.set_index([*statistics.SETTING, "method"])
    for method in order:
        rows = [by.loc[(*setting, method)] if (*setting, method) in by.index else None for setting in settings]
        axis = next(row["axis"] for row in rows if row is not None)
        table.add_row(axis, method, *(_mean(row) for row in rows))
    return table


def gap_rows(gaps: pd.DataFrame) -> Table:
    """Gaps between axes for the terminal, in points of accuracy with their 95 % intervals over units."""
    settings = gaps[statistics.SETTING].drop_duplicates().to_records(index=False).tolist()
    table = _table("Paired AUC gaps, points [95 % over units]", ("comparison",), settings)
    by = gaps.set_index([*statistics.SETTING, "comparison"])
    for name in dict.fromkeys(gaps["comparison"]):
        rows = [by.loc[(*setting, name)] if (*setting, name) in by.index else None for setting in settings]
        table.add_row(name, *(_mean(row, 100.0, "+.1f") for row in rows))
    return table


def _table(title: str, texts: Sequence[str], settings: Sequence[tuple[Any, ...]]) -> Table:
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, title=title)
    for text in texts:
        table.add_column(text, no_wrap=True)
    for setting in settings:
        table.add_column("\n".join(setting), justify="right")
    return table


def _mean(row: pd.Series | None, scale: float = 1.0, digits: str = ".3f") -> str:
    if row is None:
        return "–"
    text = format(scale * row["mean"], digits)
    if row["ci_low"] != row["ci_low"]:
        return text
    return f"{text}\n[{format(scale * row['ci_low'], digits)}, {format(scale * row['ci_high'], digits)}]"
