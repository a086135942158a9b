"""`analyze` on a run folder: which network, which images, the record, the table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from lit_prune.analysis.comparison import compare_runs
from lit_prune.analysis.request import AnalyzeRequest
from lit_prune.errors import InputError
from lit_prune.experiments.analyze import analyze, progress_bars, result_rows
from lit_prune.files import whole_file
from lit_prune.run_record import Network

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lit_prune.data import ImageData
    from lit_prune.modules import LitClassifier


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
    network = find_network(module, run_dir, ckpt_path)
    datamodule.prepare_data()
    datamodule.setup("fit")
    record = {
        "backbone": {"name": network.backbone, "arguments": network.arguments},
        "plans": len(network.plans),
        "data": datamodule.fingerprint(),
        "calibration_indices": datamodule.calibration_indices,
    }
    model = network.model.to(trainer.strategy.root_device)
    with progress_bars() as watch:
        batches = datamodule.calibration_dataloader()
        tables = analyze(model, batches, request, run_dir=run_dir, record=record, watch=watch)
    console = Console()
    console.print(result_rows(tables["layers"]))
    if compare:
        comparison = compare_runs([run_dir, *compare], request.seed)
        with whole_file(run_dir / "comparison.parquet") as partial:
            comparison.to_parquet(partial, index=False)
        console.print(plain_table(comparison, "Comparison"))
    console.print(f"tables: {run_dir}/channels.parquet, layers.parquet, analysis/")


def find_network(module: LitClassifier, run_dir: Path, ckpt_path: str | None) -> Network:
    """The trained network: of a checkpoint, else the module's own, else of the run folder's last checkpoint.

    Raises:
        InputError: no trained network, or a file that is not a checkpoint of a fit.
    """
    last = run_dir / "checkpoints" / "last.ckpt"
    if ckpt_path is None and module.is_trained:
        return Network.of(module)
    path = Path(ckpt_path) if ckpt_path is not None else last
    if ckpt_path is None and not last.is_file():
        raise InputError(
            f"analyze needs a trained network: {last} does not exist; give --ckpt_path FILE or --model.weights FILE"
        )
    if not path.is_file():
        raise InputError(f"ckpt_path: {path} is no file; give the checkpoint of a fit")
    try:
        return Network.from_checkpoint(path, module.image_shape)
    except KeyError as error:
        raise InputError(f"ckpt_path: {path} has no {error}; give plain weights to --model.weights instead") from error


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
