"""Tables of the report: the result, the stages, the protocol, the files."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text as RichText

from lit_prune.errors import InputError
from lit_prune.report.run_folder import AbsentInput, RunFolder
from lit_prune.report.sections import register_section
from lit_prune.timing import busy

ABSENT = "–"
MINUS = "−"


@dataclass(frozen=True)
class Entry:
    """One table cell: what is shown, a small remark beside it, the exact value for the tooltip, where it leads."""

    text: str
    note: str = ""
    exact: str = ""
    link: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the page: column titles, rows of cells, a caption below; `folded` titles a closed block around it."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    caption: str
    text_columns: int = 1  # leading ones
    folded: str = ""


@dataclass(frozen=True)
class Text:
    """Preformatted text of the page inside a closed block."""

    text: str
    folded: str


def format_count(value: float) -> str:
    """Returns a number with a decimal prefix and three or four digits: 40813184 -> `40.81 M`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.2f} {prefix}"
    return f"{value:g}"


def format_bytes(value: float) -> str:
    """Returns a size with a decimal prefix: 1082000 -> `1.08 MB`."""
    return f"{format_count(value)}B" if abs(value) >= 1000 else f"{value:g} B"


def format_percent(value: float) -> str:
    """Returns a share of one as a percentage: 0.9173 -> `91.73 %`."""
    return f"{100 * value:.2f} %"


def _format_milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def _format_rate(value: float) -> str:
    return f"{value:,.0f} /s" if value >= 10 else f"{value:.2g} /s"


def _signed(value: float, digits: int, unit: str) -> str:
    text = f"{abs(value):.{digits}f}"
    sign = "±" if float(text) == 0 else (MINUS if value < 0 else "+")
    return f"{sign}{text} {unit}"


def relative_change(value: float, dense: float) -> str:
    """Returns `value` against `dense` in percent of `dense`; empty where `dense` is 0."""
    return _signed(100 * (value / dense - 1), 1, "%") if dense else ""


def point_change(value: float, dense: float) -> str:
    """Returns the difference of two shares of one in percentage points."""
    return _signed(100 * (value - dense), 2, "pt")


@dataclass(frozen=True)
class Column:
    """A column of the result table: its key in `compact/report.json`, title, format, and form of change."""

    key: str
    title: str
    format: Callable[[float], str]
    change: Callable[[float, float], str] = relative_change


ACCURACY = Column("accuracy", "accuracy", format_percent, point_change)
COSTS = (
    Column("macs", "MACs", format_count),
    Column("params", "params", format_count),
    Column("latency_ms", "latency, batch 1", _format_milliseconds),
    Column("throughput", "throughput", _format_rate),
    Column("bytes", "file size", format_bytes),
)


def figure_of(record: Mapping[str, Any]) -> Column:
    """Returns the figure of a result or of a stage: what the run was told to monitor, or the accuracy."""
    name = (record.get("metric") or {}).get("name", "accuracy")
    if "acc" in name:
        return replace(ACCURACY, key=name, title=name)
    return Column(name, name, lambda value: f"{value:.4g}", lambda value, dense: f"{value - dense:+.3g}")


def is_number(value: object) -> TypeGuard[float]:
    """Tells whether `value` is a finite number (None and NaN mean: not measured)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def format_entry(value: object, quantity: Column, dense: object = None) -> Entry:
    """Returns the cell of one quantity, with the change against `dense` where both are measured."""
    if not is_number(value):
        return Entry(ABSENT)
    note = quantity.change(value, dense) if is_number(dense) else ""
    return Entry(quantity.format(value), note, repr(value))


def result_cells(result: Mapping[str, Any]) -> Table:
    """Returns the final table: dense, after each stage, compact, each with its change against dense.

    Args:
        result: content of `compact/report.json`; `stages` may be absent.

    Raises:
        InputError: `dense` or `compact` is absent.
    """
    absent = [key for key in ("dense", "compact") if not isinstance(result.get(key), Mapping)]
    if absent:
        raise InputError(f"compact/report.json has no object {' and '.join(absent)}; export the compact network again")
    dense, quantities = result["dense"], (figure_of(result), *COSTS)
    entries = [(f"after {stage.get('name', '?')}", stage) for stage in result.get("stages") or ()]
    rows = [(Entry("dense"), *(format_entry(dense.get(q.key), q) for q in quantities))]
    unsure = times_are_unsure(result)
    for name, entry in (*entries, ("compact", result["compact"])):
        rows.append((Entry(name), *(_changed(entry, dense, q, unsure) for q in quantities)))
    caption = (
        "Change against the dense network in small type; point at a number for its exact value. A stage's figure is "
        "the one after BatchNorm recalibration, before its repair; the compact network's the one after the last repair."
    )
    batch = dense.get("throughput_batch")
    titles = [f"{q.title}, batch {batch}" if q.key == "throughput" and batch else q.title for q in quantities]
    return Table(("network", *titles), tuple(rows), f"{caption} {times_hold_for(result)}".strip())


def _changed(entry: Mapping[str, Any], dense: Mapping[str, Any], quantity: Column, unsure: bool) -> Entry:
    """A cell with its change; times that are worth little have a remark in the place of a change."""
    cell = format_entry(entry.get(quantity.key), quantity, dense.get(quantity.key))
    return (
        replace(cell, note="noisy") if unsure and cell.note and quantity.key in ("latency_ms", "throughput") else cell
    )


def result_table(run: str | Path | Mapping[str, Any]) -> RichTable:
    """Returns the final table for the terminal: dense, after each stage, compact.

    Args:
        run: a run folder, or the content of its `compact/report.json`.

    Raises:
        InputError: no run folder, or one without a result.
    """
    result = run if isinstance(run, Mapping) else _read_result(run)
    title = "dense to compact" if isinstance(run, Mapping) else Path(run).resolve().name
    return terminal_table(replace(result_cells(result), caption=""), title)


def terminal_table(table: Table, title: str) -> RichTable:
    """A table of the page for the terminal, remarks below their values."""
    leading = int(any(cell.note for row in table.rows for cell in row))
    shown = RichTable(title=title, caption=table.caption, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    shown.leading = leading
    for position, column in enumerate(table.columns):
        shown.add_column(column.replace(", ", "\n"), justify="left" if position < table.text_columns else "right")
    for row in table.rows:
        shown.add_row(
            *(RichText.assemble(cell.text, (f"\n{cell.note}", "dim")) if cell.note else cell.text for cell in row)
        )
    return shown


def _read_result(run_dir: str | Path) -> dict[str, Any]:
    try:
        return RunFolder(run_dir).result
    except AbsentInput as absent:
        raise InputError(
            f"run_dir={str(run_dir)!r} has no {absent}: no compact network was written in this run"
        ) from None


@register_section("result", "Result", place=10)
def tabulate_result(run: RunFolder) -> Table:
    """Returns the final table of a run (see `result_cells`)."""
    return result_cells(run.result)


POINTS = (
    ("dense", "dense"),
    ("dense_recalibrated", "dense, recalibrated"),
    ("before", "before"),
    ("after_surgery", "after surgery"),
    ("after_recalibration", "after recalibration"),
    ("after_repair", "after repair"),
)


@register_section("stages", "Structural stages", place=30)
def tabulate_stages(run: RunFolder) -> Table:
    """Returns one column a structural stage: plan, MACs, accuracy at every point of the stage, seconds."""
    name = figure_of(run.stages[0]).title
    titles = ("plan", "epoch", "MACs", "params", *(f"{name} {title}" for _, title in POINTS), "time")
    names = tuple(str(stage.get("name", "?")) for stage in run.stages)
    rows = zip(map(Entry, titles), *(_stage_cells(stage) for stage in run.stages), strict=True)
    caption = (
        f"{name.capitalize()} of each stage at the points where it was measured: what the cut alone cost, what new "
        "BatchNorm statistics gave back (the dense network gets the same treatment for comparison), what training gave "
        "back."
    )
    return Table(("stage", *names), tuple(rows), caption)


def _stage_cells(stage: Mapping[str, Any]) -> tuple[Entry, ...]:
    quantity = figure_of(stage)
    figures = stage.get(quantity.key) or {}
    values = (format_entry(figures.get(key), quantity) for key, _ in POINTS)
    epoch = stage.get("epoch")
    return (
        Entry(summarise_plan(stage.get("plan") or {})),
        Entry(str(epoch) if is_number(epoch) else ABSENT),
        *(_reduction_cell(stage.get(key) or {}) for key in ("macs", "params")),
        *values,
        _seconds_cell(stage.get("seconds") or {}),
    )


def _reduction_cell(counts: Mapping[str, Any]) -> Entry:
    before, after = counts.get("before"), counts.get("after")
    if not (is_number(before) and is_number(after)):
        return Entry(ABSENT)
    return Entry(
        f"{format_count(before)} → {format_count(after)}", relative_change(after, before), f"{before} → {after}"
    )


def _seconds_cell(seconds: Mapping[str, Any]) -> Entry:
    measured = {key: value for key, value in seconds.items() if is_number(value)}
    if not measured:
        return Entry(ABSENT)
    parts = ", ".join(f"{key} {value:.3g} s" for key, value in measured.items())
    return Entry(f"{sum(measured.values()):.3g} s", parts)


def summarise_plan(plan: Mapping[str, Any]) -> str:
    """Returns a plan (`Plan.to_dict()`) in words: which blocks go, how many channels of how many groups stay."""
    parts = []
    blocks = plan.get("drop_blocks") or ()
    if blocks:
        parts.append(f"{len(blocks)} block{'s' * (len(blocks) > 1)} dropped: {', '.join(blocks)}")
    keep, sizes = plan.get("keep_channels") or {}, plan.get("sizes") or {}
    cut = {name: len(kept) for name, kept in keep.items() if name in sizes and len(kept) < sizes[name]}
    if cut:
        total = sum(sizes[name] for name in cut)
        parts.append(f"{sum(cut.values())} of {total} channels kept in {len(cut)} group{'s' * (len(cut) > 1)}")
    return "; ".join(parts) or "nothing removed"


def times_are_unsure(result: Mapping[str, Any]) -> bool:
    """Whether times spread widely, or the machine was busy with something else."""
    return busy(result.get("timing") or {}) or any(result[name].get("noisy") for name in ("dense", "compact"))


def times_hold_for(result: Mapping[str, Any]) -> str:
    """Sentences on what the times hold for, and a warning where they are worth little; "" where it is not known."""
    said = result.get("timing") or {}
    if not said:
        return ""
    spread = result["compact"].get("latency_spread_ms")
    quartiles = f", quartiles {spread:.2g} ms apart" if isinstance(spread, float) else ""
    text = f"Times: eager PyTorch, {said.get('device')}, {said.get('threads')} threads, {said.get('date')}{quartiles}."
    warning = " The machine was busy or the times spread widely: `lit-prune latency` measures again."
    return text + (warning if times_are_unsure(result) else "")
