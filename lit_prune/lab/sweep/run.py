"""`sweep` on a run folder: networks, data, cells that are missing, tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lit_prune.data import ImageData
from lit_prune.errors import InputError
from lit_prune.files import write_parquet
from lit_prune.lab.sweep.executors import open_executor
from lit_prune.lab.sweep.fill import Sweep
from lit_prune.lab.sweep.recovery import precision_context
from lit_prune.lab.sweep.request import Keys, SweepRequest
from lit_prune.lab.sweep.tables import area_rows, derive_tables, gap_rows, write_derived
from lit_prune.lab.sweep.work import SweepJob
from lit_prune.progress import terminal
from lit_prune.structure.networks import Network, find_network, fingerprint, read_network
from lit_prune.train.classifier import LitClassifier
from lit_prune.train.run_record import add_record

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lit_prune.train.classifier import LitClassifier


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
    job = SweepJob(request, tuple(networks.values()), datamodule, str(trainer.precision))
    context = {
        "data": datamodule.fingerprint(),
        "settings": {name: getattr(datamodule, name) for name in DATA_SETTINGS},
        "precision": job.precision,
    }
    prints = tuple(fingerprint(network.model, {}) for network in job.networks)
    sweep = Sweep(job, Keys(request, prints, context), run_dir / "sweep", tuple(networks))
    with open_executor(job, devices) as execute:
        sweep.fill(execute)
    cells = sweep.table()
    write_parquet(run_dir / "sweep.parquet", cells)
    record = {"checkpoints": dict(zip(networks, prints, strict=True)), "request": request.to_dict(), **context}
    add_record(run_dir, "sweep", record)
    _conclude(run_dir, cells, request)


def _conclude(run_dir: Path, cells: pd.DataFrame, request: SweepRequest) -> None:
    """Derived tables, terminal tables, and the exit code where cells failed."""
    tables, reasons = derive_tables(cells, request)
    write_derived(run_dir / "sweep", tables)
    console = terminal()
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


def load_networks(module: LitClassifier, run_dir: Path, checkpoints: Sequence[str]) -> dict[str, Network]:
    """Networks by the name of what they come from.

    Args:
        module: the configured network; all checkpoints hold this backbone, pruned or not.
        run_dir: its `checkpoints/last.ckpt` is taken where neither checkpoints nor trained weights are given.
        checkpoints: checkpoints of a fit, or files of plain weights.

    Raises:
        InputError: as `find_network`; a file that holds another backbone.
    """
    if not checkpoints:
        source = "weights" if module.is_trained else str(run_dir / "checkpoints" / "last.ckpt")
        networks = {source: find_network(module, run_dir, None, "sweep")}
    else:
        networks = {path: read_network(Path(path), module, "checkpoints") for path in checkpoints}
    for path, network in networks.items():
        if (network.backbone, network.arguments) != (module.backbone_name, module.arguments):
            raise InputError(
                f"checkpoints: {path} holds {network.backbone} {network.arguments}, this sweep is configured for"
                f" {module.backbone_name} {module.arguments}; change --model.backbone or leave it out"
            )
    return networks
