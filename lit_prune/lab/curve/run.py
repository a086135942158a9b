"""`curve` on a run folder: which network, which images, the table and its record."""

from dataclasses import asdict
from pathlib import Path

import lightning.pytorch as pl
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lit_prune.data import ImageData
from lit_prune.files import write_parquet
from lit_prune.lab.curve.table import CurveRequest, curve
from lit_prune.progress import progress_bars, terminal
from lit_prune.structure.networks import find_network
from lit_prune.train.classifier import LitClassifier
from lit_prune.train.run_record import add_record, subject

FILE, FOLDER = "curve.parquet", "curve"


def curve_run(
    trainer: pl.Trainer,
    model: LitClassifier,
    datamodule: ImageData,
    request: CurveRequest = CurveRequest(),  # noqa: B008  (frozen)
    ckpt_path: str | None = None,
) -> None:
    """What seconds buy: the accuracy at several budgets, without training and after growing times of repair.

    Writes `curve.parquet`, the key `curve` of `run.json`, and the network of every point in a compact folder below
    `curve/`. A point whose folder is there for the same network, images and settings is not computed again. One
    process.

    Args:
        trainer: says where, and on which device.
        model: the network; its weights come from `ckpt_path`, else from `--model.weights` or `--model.pretrained`,
            else from `checkpoints/last.ckpt` of the run folder.
        datamodule: calibration images, training images to repair on, and the validation split that the figure is
            of.
        request: budgets, seconds of repair.
        ckpt_path: checkpoint of a `fit`, pruned or not.
    """
    run_dir = Path(trainer.default_root_dir)
    network = find_network(model, run_dir, ckpt_path, "curve")
    datamodule.prepare_data()
    datamodule.setup()
    network.to(trainer.strategy.root_device)
    training, held_out = datamodule.recalibration_dataloader(), datamodule.subset_dataloader("val")
    images = datamodule.calibration_dataloader(), request, training, held_out
    with progress_bars() as watch:
        table = curve(network, *images, "classification", run_dir / FOLDER, watch)
    write_parquet(run_dir / FILE, table)
    add_record(run_dir, "curve", {**asdict(request), **subject(network, datamodule, request.images)})
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
