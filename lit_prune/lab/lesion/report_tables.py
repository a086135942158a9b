"""Tables of lesions on the report page, and next to them what the two-axis paper found."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from lit_prune.report.run_folder import AbsentInput, RunFolder
from lit_prune.report.sections import register_section
from lit_prune.report.tables import Entry, Table

PAPER = "Printed small: the two-axis paper's tables 15 and 16 (45 cells of CIFAR-100 networks, 2,720 channels)."
PAPER_REPLACEMENT = {1e-4: (0.666, 0.808, 0.357, 0.176), 1e-3: (0.687, 0.843, 0.423, 0.225)}
PAPER_REPLACEMENT |= {5e-3: (0.799, 0.899, 0.516, 0.284)}
PAPER_MATCHED = {1e-4: (0.131, -0.012, 0.038, 0.603), 1e-3: (0.218, 0.006, -0.004, 0.630)}
PAPER_MATCHED |= {5e-3: (0.258, -0.002, -0.048, 0.645)}


@register_section("replacement", "Recovery by least damage", place=200)
def tabulate_replacement(run: RunFolder) -> Table:
    """Peer replacement by threshold, of all runs that were pooled where there are any."""
    return replacement_table(*_read(run, "thresholds"))


def replacement_table(table: pd.DataFrame, of: str) -> Table:
    """The same of a table of `lesion_tables`, and what it is of."""

    def cells(row: Any) -> list[Entry]:
        helped = _interval(row.helped, row.helped_low, row.helped_high)
        return [_cell(row.median_recovery), helped, _cell(row.peer_r2), _cell(row.task_information)]

    columns = ("lesion damage above", "channels", "median recovery", "peers help", "ρ(peer R², recovery)")
    noise = ", ".join(f"{row.noise:.1e}" for row in table.itertuples())
    caption = (
        f"What peers recover of a lesion's damage, {of}, with Wilson's 95 % interval. Median standard error of the "
        f"damage itself, by row: {noise} nats; a threshold below it sorts noise. {PAPER}"
    )
    return Table((*columns, "ρ(I_T, recovery)"), _rows(table, cells, PAPER_REPLACEMENT), caption)


@register_section("matched", "Recovery at matched task information", place=210)
def tabulate_matched(run: RunFolder) -> Table:
    """What predicts recovery at matched task information."""
    return matched_table(*_read(run, "matched_task"))


def matched_table(table: pd.DataFrame, of: str) -> Table:
    """The same of a table of `lesion_tables`, and what it is of."""

    def cells(row: Any) -> list[Entry]:
        names = ("peer_r2", "input_capture", "task_information")
        found = [_interval(*(getattr(row, name + end) for end in ("", "_low", "_high"))) for name in names]
        return [*found, _interval(row.high_peer_win, row.win_low, row.win_high)]

    columns = ("lesion damage above", "channels", "ρ of peer R²", "ρ of I_X", "ρ of I_T", "high-peer win")
    caption = (
        f"Spearman correlations with recovery within bins of task information, {of}, with 95 % bootstrap intervals; "
        f"how often the half of a bin with the better explained channels recovers more (Wilson). {PAPER}"
    )
    return Table(columns, _rows(table, cells, PAPER_MATCHED), caption)


@register_section("ranking", "Scores and the damage of lesions", place=180)
def tabulate_ranking(run: RunFolder) -> Table:
    """Which score ranks the damage."""
    return damage_table(*_read(run, "ranking"))


def damage_table(table: pd.DataFrame, of: str) -> Table:
    """The same of a table of `lesion_tables`, and what it is of."""
    rows = []
    for row in table.itertuples():
        mean = Entry(f"{_number(row.agreement)} ± {_number(row.standard_error)}", exact=str(row.agreement))
        win = _interval(row.matched_win, row.win_low, row.win_high)
        rows.append((Entry(row.score), mean, _cell(row.pooled), win))
    caption = (
        f"Scores oriented so that larger means safer to remove, {of}: Spearman correlation with low damage (mean and "
        "standard error over layers; pooled after ranking within layers), and how often the larger score wins between "
        "two channels of like input capture."
    )
    return Table(("score", "ρ within layers", "pooled", "win at matched I_X"), tuple(rows), caption)


def _read(run: RunFolder, name: str) -> tuple[pd.DataFrame, str]:
    """The table of the pooled runs, else of this one, and which it is."""
    try:
        return run.table(f"lesions/pooled/{name}.parquet"), "all runs compared"
    except AbsentInput:
        return run.table(f"lesions/{name}.parquet"), "this run"


def _rows(
    table: pd.DataFrame, cells: Callable[[Any], list[Entry]], paper: dict[float, tuple[float, ...]]
) -> tuple[tuple[Entry, ...], ...]:
    rows = []
    for row in table.itertuples():
        found = cells(row)
        printed = [f"({value:g})" for value in paper.get(row.threshold, ())] or [""] * len(found)
        noted = [Entry(cell.text, small, cell.exact) for cell, small in zip(found, printed, strict=True)]
        rows.append((Entry(f"{row.threshold:g} nats"), Entry(str(row.channels)), *noted))
    return tuple(rows)


def _number(value: float) -> str:
    return "–" if value != value else f"{value:.3f}"


def _cell(value: float) -> Entry:
    return Entry(_number(value), exact=str(value))


def _interval(value: float, low: float, high: float) -> Entry:
    return Entry(_number(value) if value != value else f"{value:.3f} [{low:.3f}, {high:.3f}]", exact=str(value))
