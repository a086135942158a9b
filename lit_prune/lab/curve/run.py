"""`curve` on a run folder: which network, which images, the table and its record."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lit_prune.files import write_parquet
from lit_prune.lab.curve.table import CurveRequest, curve
from lit_prune.progress import progress_bars, terminal
from lit_prune.structure.networks import find_network
from lit_prune.train.run_record import add_record, subject

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lit_prune.data import ImageData
    from lit_prune.train.classifier import LitClassifier

FILE, FOLDER = "curve.parquet", "curve"


def curve_run(
    trainer: pl.Trainer, module: LitClassifier, data: ImageData, request: CurveRequest, ckpt_path: str | None
) -> None:
    """Carries out the verb; see `Trainer.curve`."""
    run_dir = Path(trainer.default_root_dir)
    network = find_network(module, run_dir, ckpt_path, "curve")
    data.prepare_data()
    data.setup()
    model = network.model.to(trainer.strategy.root_device)
    images = data.calibration_dataloader(), request, data.recalibration_dataloader(), data.subset_dataloader("val")
    with progress_bars() as watch:
        table = curve(model, *images, "classification", run_dir / FOLDER, watch)
    write_parquet(run_dir / FILE, table)
    add_record(run_dir, "curve", {**asdict(request), **subject(network, data, request.images)})
    terminal().print(curve_rows(table))
    terminal().print(f"table: {run_dir / FILE}; the networks, each a compact folder: {run_dir / FOLDER}")


def curve_rows(table: pd.DataFrame) -> Table:
    """One row a network: its size, the seconds that it took, its figure and what it lost."""
    shown = Table(title=f"Dense: {table['dense'].iloc[0]:.2%}", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("keep", "MACs", "params", "repair", "seconds in all", "accuracy", "lost", "agreement"):
        shown.add_column(name, justify="right")
    for row in table.itertuples():
        shares = (f"{row.keep:g}", f"{row.macs_ratio:.1%}", f"{row.params_ratio:.1%}")
        figures = (f"{row.figure:.2%}", f"{100 * row.loss:+.2f}", f"{row.agreement:.1%}")
        shown.add_row(*shares, f"{row.repair:g} s", f"{row.seconds:.0f}", *figures)
    return shown
