"""`sweep` on a run folder: networks, data, cells that are missing, tables."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console

from lit_prune.data import ImageData
from lit_prune.errors import InputError
from lit_prune.experiments.analyze import fingerprint
from lit_prune.experiments.sweep.cells import Keys
from lit_prune.experiments.sweep.executors import open_executor
from lit_prune.experiments.sweep.fill import Sweep
from lit_prune.experiments.sweep.networks import load_networks
from lit_prune.experiments.sweep.recovery import precision_context
from lit_prune.experiments.sweep.request import SweepRequest
from lit_prune.experiments.sweep.tables import area_rows, derive_tables, gap_rows, write_derived, write_table
from lit_prune.experiments.sweep.work import Job
from lit_prune.files import write_json
from lit_prune.run_record import write_run

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lit_prune.modules import LitClassifier

DATA_SETTINGS = ("batch_size", "seed", "train_size", "val_size", "calibration_size", "pad", "padding", "flip")


def sweep_run(
    trainer: pl.Trainer,
    module: LitClassifier,
    datamodule: ImageData,
    request: SweepRequest,
    checkpoints: Sequence[str] = (),
) -> None:
    """Carries out the verb; see `Trainer.sweep`."""
    run_dir = Path(trainer.default_root_dir)
    devices = getattr(trainer.strategy, "parallel_devices", None) or [trainer.strategy.root_device]
    precision_context(str(trainer.precision), devices[0])
    networks = load_networks(module, run_dir, checkpoints)
    datamodule.prepare_data()
    datamodule.setup()
    job = Job(request, tuple(networks.values()), datamodule, str(trainer.precision))
    context = {
        "data": datamodule.fingerprint(),
        "settings": {name: getattr(datamodule, name) for name in DATA_SETTINGS},
        "precision": job.precision,
    }
    prints = tuple(fingerprint(network.model, {}) for network in job.networks)
    sweep = Sweep(job, Keys(request, prints, context), run_dir / "sweep", tuple(networks))
    with alone(sweep.folder), open_executor(job, devices) as execute:
        sweep.fill(execute)
    cells = sweep.table()
    write_table(run_dir / "sweep.parquet", cells)
    record = {"checkpoints": dict(zip(networks, prints, strict=True)), "request": request.to_dict(), **context}
    _write_record(run_dir, record)
    _conclude(run_dir, cells, request)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the folder of a sweep, so that no second process computes the same cells.

    Raises:
        InputError: another sweep holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"run_dir: a sweep is at work in {folder.parent}; wait for it or give another --run_dir"
            ) from None
        yield


def _write_record(run_dir: Path, sweep: dict[str, Any]) -> None:
    """Adds the key `sweep` to run.json, or begins the file."""
    file = run_dir / "run.json"
    if file.is_file():
        write_json(file, {**json.loads(file.read_text(encoding="utf-8")), "sweep": sweep})
    else:
        write_run(run_dir, {"verb": "sweep", "sweep": sweep})


def _conclude(run_dir: Path, cells: pd.DataFrame, request: SweepRequest) -> None:
    """Derived tables, terminal tables, and the exit code where cells failed."""
    tables, reasons = derive_tables(cells, request)
    write_derived(run_dir / "sweep", tables)
    console = Console()
    if "auc" in tables:
        console.print(area_rows(tables["auc"]))
        console.print(gap_rows(tables["gaps"]))
    console.print(f"tables: {run_dir}/sweep.parquet, {run_dir}/sweep/*.parquet")
    failed = cells[cells["error"].notna()]
    if len(failed):
        first = failed.iloc[0]
        raise SystemExit(
            f"error: {len(failed)} of {len(cells)} cells failed, first {first['method']} {first['allocation']} at"
            f" sparsity {first['sparsity']:g}: {first['error']}"
        )
    if reasons:
        raise reasons[0]
