"""`analyze` on a run folder: which network, which images, the record, the table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.table import Table

from lit_prune.files import write_parquet
from lit_prune.lab.analyze.analysis import analyze, result_rows
from lit_prune.lab.analyze.comparison import compare_runs
from lit_prune.lab.analyze.request import AnalyzeRequest
from lit_prune.progress import progress_bars, terminal
from lit_prune.structure.networks import find_network
from lit_prune.train.run_record import subject

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lit_prune.data import ImageData
    from lit_prune.train.classifier import LitClassifier


def analyze_run(
    trainer: pl.Trainer,
    module: LitClassifier,
    datamodule: ImageData,
    request: AnalyzeRequest,
    compare: Sequence[str] = (),
    ckpt_path: str | None = None,
) -> None:
    """Carries out the verb; see `Trainer.analyze`."""
    run_dir = Path(trainer.default_root_dir)
    network = find_network(module, run_dir, ckpt_path, "analyze")
    datamodule.prepare_data()
    datamodule.setup("fit")
    model = network.model.to(trainer.strategy.root_device)
    with progress_bars() as watch:
        batches = datamodule.calibration_dataloader()
        record = subject(network, datamodule)
        tables = analyze(model, batches, request, run_dir=run_dir, record=record, watch=watch)
    console = terminal()
    console.print(result_rows(tables["layers"]))
    if compare:
        comparison = compare_runs([run_dir, *compare], request.seed)
        write_parquet(run_dir / "comparison.parquet", comparison)
        console.print(plain_table(comparison, "Comparison"))
    console.print(f"tables: {run_dir}/channels.parquet, layers.parquet, analysis/")


def plain_table(table: pd.DataFrame, title: str) -> Table:
    """A table for the terminal; numbers with three digits after the point."""
    shown = Table(title=title)
    for column in table.columns:
        shown.add_column(column.replace("_", " "), justify="left" if table[column].dtype == object else "right")
    for row in table.itertuples(index=False):
        shown.add_row(*(_format(value) for value in row))
    return shown


def _format(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
