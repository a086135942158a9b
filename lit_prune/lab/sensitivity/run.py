"""`sensitivity` on a run folder: which network, which images, the table and its record."""

from dataclasses import asdict
from pathlib import Path

import lightning.pytorch as pl
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lit_prune.data import ImageData
from lit_prune.files import write_parquet
from lit_prune.lab.sensitivity.table import Asked, sensitivity
from lit_prune.progress import progress_bars, terminal
from lit_prune.structure.networks import find_network
from lit_prune.train.classifier import LitClassifier
from lit_prune.train.run_record import add_record, subject

FILE = "sensitivity.parquet"


def sensitivity_run(
    trainer: pl.Trainer,
    model: LitClassifier,
    datamodule: ImageData,
    request: Asked = Asked(),  # noqa: B008  (frozen)
    ckpt_path: str | None = None,
) -> None:
    """One layer at a time at several widths: the figure after the cut, and with the readers solved again.

    Nothing is trained. Writes `sensitivity.parquet` and the key `sensitivity` of `run.json`. One process.

    Args:
        trainer: says where, and on which device.
        model: the network; its weights come from `ckpt_path`, else from `--model.weights` or `--model.pretrained`,
            else from `checkpoints/last.ckpt` of the run folder.
        datamodule: calibration images, and the validation split that the figure is of.
        request: widths, score, groups.
        ckpt_path: checkpoint of a `fit`, pruned or not.
    """
    run_dir = Path(trainer.default_root_dir)
    network = find_network(model, run_dir, ckpt_path, "sensitivity")
    datamodule.prepare_data()
    datamodule.setup()
    network.to(trainer.strategy.root_device)
    held_out = datamodule.subset_dataloader("val", request.images)
    with progress_bars() as watch:
        table = sensitivity(network, datamodule.calibration_dataloader(), request, held_out, watch=watch)
    write_parquet(run_dir / FILE, table)
    add_record(run_dir, "sensitivity", {**asdict(request), **subject(network, datamodule, request.images)})
    terminal().print(sensitivity_rows(table))
    terminal().print(f"table: {run_dir / FILE}")


def sensitivity_rows(table: pd.DataFrame) -> Table:
    """One row a group: the loss of the figure at each width, after the cut and with solved readers."""
    value = "loss_refit" if "loss_refit" in table else "loss"
    shares = sorted(table["keep"].unique(), reverse=True)
    title = "Loss of the figure, one group at a time" + (" (cut → readers solved again)" if value != "loss" else "")
    shown = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(("group", "units", *(f"keep {share:g}" for share in shares))):
        shown.add_column(name, justify="right" if place else "left")
    for group, rows in table.groupby("group", sort=False):
        found = {row.keep: row for row in rows.itertuples()}
        cells = [
            f"{found[share].loss:+.3f} → {getattr(found[share], value):+.3f}" if share in found else "–"
            for share in shares
        ]
        shown.add_row(str(group), str(rows["units"].iloc[0]), *cells)
    return shown
