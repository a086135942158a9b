"""`sensitivity` on a run folder: which network, which images, the table and its record."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lit_prune.files import write_parquet
from lit_prune.lab.sensitivity.table import Asked, sensitivity
from lit_prune.progress import progress_bars, terminal
from lit_prune.structure.networks import find_network
from lit_prune.train.run_record import add_record, subject

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lit_prune.data import ImageData
    from lit_prune.train.classifier import LitClassifier

FILE = "sensitivity.parquet"


def sensitivity_run(
    trainer: pl.Trainer, module: LitClassifier, data: ImageData, asked: Asked, ckpt_path: str | None
) -> None:
    """Carries out the verb; see `Trainer.sensitivity`."""
    run_dir = Path(trainer.default_root_dir)
    network = find_network(module, run_dir, ckpt_path, "sensitivity")
    data.prepare_data()
    data.setup()
    model = network.model.to(trainer.strategy.root_device)
    held_out = data.subset_dataloader("val", asked.images)
    with progress_bars() as watch:
        table = sensitivity(model, data.calibration_dataloader(), asked, held_out, watch=watch)
    write_parquet(run_dir / FILE, table)
    add_record(run_dir, "sensitivity", {**asdict(asked), **subject(network, data, asked.images)})
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
