"""`analyze` on a run folder: network, images, record, the table on the terminal; several analysed runs together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
from rich.table import Table

from lit_prune.data import ImageData
from lit_prune.errors import InputError
from lit_prune.files import read_json, read_parquet, write_parquet
from lit_prune.lab.analyze.analysis import analyze, result_rows
from lit_prune.lab.analyze.request import AnalyzeRequest
from lit_prune.measurement.summaries import leave_one_out_means, unit_bootstrap
from lit_prune.progress import progress_bars, terminal
from lit_prune.structure.networks import find_network
from lit_prune.train.classifier import LitClassifier
from lit_prune.train.run_record import subject

STATISTICS = ("coupling", "rand_index", "collapse", "triplet_ratio", "modularity_redundancy", "modularity_excess")


def analyze_run(
    trainer: pl.Trainer,
    model: LitClassifier,
    datamodule: ImageData,
    request: AnalyzeRequest = AnalyzeRequest(),  # noqa: B008  (frozen)
    compare: list[str] | None = None,
    ckpt_path: str | None = None,
) -> None:
    """Channel and layer tables of a trained network, with the extras and controls asked for.

    Reads the calibration images of the data; writes `channels.parquet`, `layers.parquet`, `analysis/` and the key
    `analyze` of `run.json` in the run folder, and nothing else there. An extra that is there already for the same
    network, images and settings is not computed again. One process, on the first device.

    Args:
        trainer: says where, and on which device.
        model: the network; its weights come from `ckpt_path`, else from `--model.weights` or `--model.pretrained`,
            else from `checkpoints/last.ckpt` of the run folder.
        datamodule: the images it was trained on.
        request: extras and settings.
        compare: run folders analysed before; one table of layer statistics over these and this run, with bootstrap
            intervals over runs and means without each architecture, goes to `comparison.parquet`.
        ckpt_path: checkpoint of a `fit`, pruned or not.
    """
    run_dir = Path(trainer.default_root_dir)
    network = find_network(model, run_dir, ckpt_path, "analyze")
    datamodule.prepare_data()
    datamodule.setup("fit")
    network.to(trainer.strategy.root_device)
    with progress_bars() as watch:
        batches = datamodule.calibration_dataloader()
        record = subject(network, datamodule)
        tables = analyze(network, batches, request, run_dir=run_dir, record=record, watch=watch)
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


def compare_runs(folders: Sequence[str | Path], seed: int = 0) -> pd.DataFrame:
    """Table of layer statistics over several analysed runs, each run one unit.

    Columns: statistic, runs, mean, low, high (95 % bootstrap over runs, not over layers), layer_mean, layer_error
    (standard error over all layers), and without_<architecture>, the mean over the units of the other architectures.

    Raises:
        InputError: fewer than two runs, or a folder that was not analysed.

    Source: the two-axis paper, table 3.
    """
    if len(folders) < 2:
        raise InputError(f"compare: {len(folders)} run folders; give at least two analysed ones")
    layers = pd.concat([_layers(Path(folder)) for folder in folders], ignore_index=True)
    rows = []
    for name in (name for name in STATISTICS if name in layers):
        values = layers[name]
        interval = unit_bootstrap(values, layers["run"], seed=seed)
        others = leave_one_out_means(values, layers["run"], layers["architecture"])
        rows.append(
            {
                "statistic": name,
                "runs": layers["run"].nunique(),
                "mean": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "layer_mean": values.mean(),
                "layer_error": values.sem(),
                **{f"without_{architecture}": mean for architecture, mean in others.items()},
            }
        )
    return pd.DataFrame(rows)


def _layers(folder: Path) -> pd.DataFrame:
    """The layer table of a run with the columns run and architecture."""
    files = folder / "layers.parquet", folder / "run.json"
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(f"compare: {folder} has no {' and '.join(missing)}; analyze that run first")
    record = read_json(files[1])
    backbone = record.get("analyze", record).get("backbone") or {}
    return read_parquet(files[0]).assign(run=str(folder), architecture=backbone.get("name", "unknown"))
