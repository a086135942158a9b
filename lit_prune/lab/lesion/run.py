"""`lesion` on a run folder: which network, which images, the record, the tables on the terminal."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
from rich.console import Console
from torch import Tensor

from lit_prune.data import ImageData
from lit_prune.errors import InputError
from lit_prune.files import read_parquet
from lit_prune.lab.analyze.evidence import cut_batches
from lit_prune.lab.lesion.report_tables import damage_table, matched_table, replacement_table
from lit_prune.lab.lesion.request import LesionRequest
from lit_prune.lab.lesion.table import Frames, ImagePair, lesion, write_tables
from lit_prune.measurement.layers import Batches
from lit_prune.progress import progress_bars, terminal
from lit_prune.report.tables import terminal_table
from lit_prune.structure.networks import find_network
from lit_prune.task import Classification
from lit_prune.train.classifier import LitClassifier
from lit_prune.train.evaluation import Evaluation
from lit_prune.train.run_record import add_record, subject

SPLIT = "val"


def lesion_run(
    trainer: pl.Trainer,
    model: LitClassifier,
    datamodule: ImageData,
    request: LesionRequest = LesionRequest(),  # noqa: B008  (frozen)
    compare: list[str] | None = None,
    ckpt_path: str | None = None,
) -> None:
    """Sets single channels to zero, or to what their peers say of them, and measures the rise of the loss.

    Nothing is trained. Writes `lesions.parquet`, `lesions/` (what the lesions say of peers, scores and the axes)
    and the key `lesion` of `run.json` in the run folder. A layer is written when it is done, and one that is there
    already for the same network, images and settings is not computed again. One process, on the first device.

    Args:
        trainer: says where, and on which device.
        model: the network; its weights come from `ckpt_path`, else from `--model.weights` or `--model.pretrained`,
            else from `checkpoints/last.ckpt` of the run folder.
        datamodule: the images it was trained on: metrics and the peers' fit use the calibration images, losses the
            validation split (the test split where there is none).
        request: layers, channels and settings.
        compare: run folders with lesions; the tables of these and this run together go to `lesions/pooled/`.
        ckpt_path: checkpoint of a `fit`, pruned or not.
    """
    run_dir, console = Path(trainer.default_root_dir), terminal()
    others = [read_lesions(folder) for folder in compare or ()]
    network = find_network(model, run_dir, ckpt_path, "lesion")
    datamodule.prepare_data()
    datamodule.setup()
    record = subject(network, datamodule, request.limit)
    network.model.to(trainer.strategy.root_device)
    calibration = FirstImages(datamodule.calibration_dataloader(), request.limit)
    images = ImagePair(calibration, datamodule.subset_dataloader(SPLIT, request.images))
    with progress_bars() as watch:
        table, whole = lesion(network.model, images, request, run_dir=run_dir, record=record, watch=watch)
    tables = write_tables(run_dir / "lesions", table, request.seed)
    add_record(run_dir, "lesion", {**record, "request": asdict(request), **evaluation_record(whole)})
    for line in clipped_lines(table, request):
        console.print(line)
    show(console, tables, f"{len(table)} channels of {table['layer'].nunique()} layers, {whole.images} images")
    if others:
        pooled = pd.concat([name_cells(table, run_dir), *others], ignore_index=True)
        tables = write_tables(run_dir / "lesions" / "pooled", pooled, request.seed)
        show(console, tables, f"{len(pooled)} channels of {1 + len(others)} runs")
    console.print(f"tables: {run_dir}/lesions.parquet, lesions/")


@dataclass(frozen=True)
class FirstImages:
    """The first `limit` images of batches that can be read again; None takes all."""

    batches: Batches
    limit: int | None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches."""
        return cut_batches(self.batches, Classification(), self.limit)


def evaluation_record(whole: Evaluation) -> dict[str, Any]:
    """The unharmed network on the evaluation images."""
    return {"split": SPLIT, "images": whole.images, "loss": whole.loss, "accuracy": whole.figure}


def read_lesions(folder: str | Path) -> pd.DataFrame:
    """Lesions of another run, its cells named after the run.

    Raises:
        InputError: the run has none, or none with the standard error of the damage.
    """
    file = Path(folder) / "lesions.parquet"
    table = read_parquet(file) if file.is_file() else pd.DataFrame()
    if "damage_error" not in table:
        raise InputError(f"compare: {folder} has no lesions.parquet with damage_error; lesion that run first")
    return name_cells(table, folder)


def name_cells(table: pd.DataFrame, folder: str | Path) -> pd.DataFrame:
    """The table with layers named `run/layer`, so that layers of several networks stay apart."""
    return table.assign(layer=[f"{Path(folder)}/{layer}" for layer in table["layer"]])


def clipped_lines(table: pd.DataFrame, request: LesionRequest) -> list[str]:
    """What to say of layers with fewer live channels than asked for."""
    counts = table.groupby("layer", sort=False).size()
    short = counts[counts < (request.channels or 0)]
    if not len(short):
        return []
    named = ", ".join(f"{layer} {count}" for layer, count in short.head(6).items())
    more = f", and {len(short) - 6} more" if len(short) > 6 else ""
    return [f"channels: fewer than {request.channels} live ones, all taken: {named}{more}"]


def show(console: Console, tables: Frames, title: str) -> None:
    """Prints the tables that say most."""
    console.print(terminal_table(replacement_table(tables["thresholds"], title), "Peer replacement"))
    console.print(terminal_table(matched_table(tables["matched_task"], title), "Recovery at matched I_T"))
    console.print(terminal_table(damage_table(tables["ranking"], title), "Agreement of scores with low damage"))
