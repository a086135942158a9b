"""The schedule sweep of block removal: one repaired network for each ratio, one table of all."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lit_prune.errors import InputError
from lit_prune.files import read_json, write_parquet

SHOWN = {
    "remove_ratio": "r",
    "blocks_removed": "blocks",
    "macs_ratio": "MACs",
    "params_ratio": "params",
    "accuracy_dense": "dense",
    "accuracy_dense_recalibrated": "recal.",
    "accuracy_after_surgery": "cut",
    "accuracy_after_recalibration": "recal.",
    "accuracy_after_repair": "repaired",
}
CAPTION = "r: share of free blocks removed; MACs, params: share left; accuracies; recal.: recalibrated BatchNorm"


def schedule_sweep(
    run_dir: Path, ratios: Sequence[float], run_one: Callable[[float, Path], None], count: Callable[[float], int]
) -> Table:
    """Runs `run_one(ratio, folder)` for each ratio and tabulates what the runs handed over.

    A ratio whose folder already holds its `compact/report.json` is not run again, so a killed sweep resumes.

    Args:
        run_dir: each ratio gets the folder `ratio=0.25` in it; the table is written to `schedule.parquet`.
        ratios: shares of the free blocks to remove, each in (0, 1).
        run_one: carries out one compression in the folder it is given.
        count: how many blocks go at a ratio.

    Raises:
        InputError: a ratio outside (0, 1), one that removes no block, or two that remove the same ones.

    Source: m2m_dc section 4.1 (r = 0.10, 0.25, 0.40, 0.50).
    """
    outside = [ratio for ratio in ratios if not 0 < ratio < 1]
    if outside:
        raise InputError(f"ratios must lie in (0, 1), got {outside}")
    if len({float(ratio) for ratio in ratios}) < len(ratios):
        raise InputError(f"ratios must be distinct, got {list(ratios)}")
    _check_counts({ratio: count(ratio) for ratio in ratios})
    rows = []
    for ratio in ratios:
        folder = run_dir / f"ratio={ratio if round(ratio, 2) != ratio else format(ratio, '.2f')}"
        if not (folder / "compact" / "report.json").exists():
            run_one(ratio, folder)
        rows.append(_row(ratio, folder))
    table = pd.DataFrame(rows)
    write_parquet(run_dir / "schedule.parquet", table)
    return _terminal_table(table)


def _check_counts(blocks: dict[float, int]) -> None:
    """Refuses ratios that do not stand for a network each."""
    taken: dict[int, float] = {0: 0.0}
    for ratio, number in blocks.items():
        if number in taken:
            raise InputError(
                f"ratios: {ratio} removes {number} blocks, the same as {taken[number]}; give ratios that differ by a "
                "block at least"
            )
        taken[number] = ratio


def _row(ratio: float, folder: Path) -> dict[str, float | int]:
    """Figures of one finished run."""
    report = read_json(folder / "compact" / "report.json")
    stages = [json.loads(line) for line in (folder / "stages.jsonl").read_text().splitlines()]
    return {
        "remove_ratio": ratio,
        "blocks_removed": sum(len(stage["plan"]["drop_blocks"]) for stage in stages),
        "macs_ratio": report["compact"]["macs"] / report["dense"]["macs"],
        "params_ratio": report["compact"]["params"] / report["dense"]["params"],
        "accuracy_dense": stages[0]["accuracy"]["dense"],
        "accuracy_dense_recalibrated": stages[0]["accuracy"]["dense_recalibrated"],
        "accuracy_after_surgery": stages[0]["accuracy"]["after_surgery"],
        "accuracy_after_recalibration": stages[0]["accuracy"]["after_recalibration"],
        "accuracy_after_repair": stages[-1]["accuracy"]["after_repair"],
    }


def _terminal_table(table: pd.DataFrame) -> Table:
    """The sweep as a table for the terminal; shares and accuracies in percent."""
    shown = Table(title="Schedule sweep", caption=CAPTION, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in table.columns:
        shown.add_column(SHOWN[column], justify="right", no_wrap=True)
    for row in table.itertuples(index=False):
        shown.add_row(*(str(v) if isinstance(v, int) else f"{v:.1%}" for v in row))
    return shown
