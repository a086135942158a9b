"""`sweep` on a run folder: networks, data, cells that are missing, and the tables derived from them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import lightning.pytorch as pl
import pandas as pd
from torch import nn

from lit_prune.data import ImageData
from lit_prune.errors import InputError
from lit_prune.files import write_parquet
from lit_prune.lab.sweep import statistics
from lit_prune.lab.sweep.executors import open_executor
from lit_prune.lab.sweep.figures import area_table, gap_table
from lit_prune.lab.sweep.fill import Sweep
from lit_prune.lab.sweep.recovery import precision_context
from lit_prune.lab.sweep.request import Keys, SweepRequest
from lit_prune.lab.sweep.work import SweepJob
from lit_prune.progress import terminal
from lit_prune.report.tables import terminal_table
from lit_prune.structure.networks import find_network, fingerprint, read_network
from lit_prune.structure.record import record_of
from lit_prune.train.classifier import LitClassifier
from lit_prune.train.run_record import add_record

DATA_SETTINGS = ("batch_size", "seed", "train_size", "val_size", "calibration_size", "pad", "padding", "flip")
DERIVED = ("auc", "gaps", "signs", "selector", "weights", "recovery", "rules")


def sweep_run(
    trainer: pl.Trainer,
    model: LitClassifier,
    datamodule: ImageData,
    request: SweepRequest = SweepRequest(),  # noqa: B008  (frozen)
    checkpoints: list[str] | None = None,
) -> None:
    """Methods × sparsities × seeds under one protocol: accuracy against the share of MACs removed.

    Every cell is written to `sweep/cells/` of the run folder when it is done, and a sweep that was stopped goes on
    from there; failed cells are tried again. At the end `sweep.parquet` has one row a cell, and `sweep/` the areas
    under the curves, the paired gaps between axes, the leave-one-seed-out choice, the weight sweeps, the recovery
    budgets and the comparison of allocations. Exit code 1 where a cell failed.

    Args:
        trainer: says where, and on which device.
        model: the network; its weights come from `checkpoints`, else from `--model.weights` or
            `--model.pretrained`, else from `checkpoints/last.ckpt` of the run folder.
        datamodule: the images it was trained on: calibration and recovery use the training split, accuracy the
            test split.
        request: what to sweep over, and the protocol.
        checkpoints: checkpoints of a fit or files of weights, all of this backbone; several are model seeds.
    """
    run_dir = Path(trainer.default_root_dir)
    devices = getattr(trainer.strategy, "parallel_devices", None) or [trainer.strategy.root_device]
    precision_context(str(trainer.precision), devices[0])
    networks = load_networks(model, run_dir, checkpoints or ())
    datamodule.prepare_data()
    datamodule.setup()
    job = SweepJob(request, tuple(networks.values()), datamodule, str(trainer.precision))
    context = {
        "data": datamodule.fingerprint(),
        "settings": {name: getattr(datamodule, name) for name in DATA_SETTINGS},
        "precision": job.precision,
    }
    prints = tuple(fingerprint(network, {}) for network in job.networks)
    sweep = Sweep(job, Keys(request, prints, context), run_dir / "sweep", tuple(networks))
    with open_executor(job, devices) as execute:
        sweep.fill(execute)
    cells = sweep.table()
    write_parquet(run_dir / "sweep.parquet", cells)
    record = {"checkpoints": dict(zip(networks, prints, strict=True)), "request": asdict(request), **context}
    add_record(run_dir, "sweep", record)
    _conclude(run_dir, cells, request)


def _conclude(run_dir: Path, cells: pd.DataFrame, request: SweepRequest) -> None:
    """Derived tables, terminal tables, and the exit code where cells failed."""
    tables, reasons = derive_tables(cells, request)
    write_derived(run_dir / "sweep", tables)
    console = terminal()
    if "auc" in tables:
        console.print(terminal_table(area_table(tables["auc"]), "Accuracy over MACs removed (AUC)"))
        console.print(terminal_table(gap_table(tables["gaps"]), "Paired AUC gaps, points"))
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


def load_networks(module: LitClassifier, run_dir: Path, checkpoints: Sequence[str]) -> dict[str, nn.Module]:
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
        record = record_of(network)
        if (record.backbone, record.arguments) != (module.backbone_name, module.arguments):
            raise InputError(
                f"checkpoints: {path} holds {record.backbone} {record.arguments}, this sweep is configured for"
                f" {module.backbone_name} {module.arguments}; change --model.backbone or leave it out"
            )
    return networks


def derive_tables(cells: pd.DataFrame, request: SweepRequest) -> tuple[dict[str, pd.DataFrame], list[InputError]]:
    """The derived tables by name, and why some cannot be made.

    Args:
        cells: one row a cell, see `sweep.parquet`.
        request: says which methods are compared with each other.
    """
    curves = statistics.accuracy_curves(cells)
    tables, reasons = {"recovery": statistics.recovery_budgets(cells)}, []

    def attempt(name: str, make: Callable[[], pd.DataFrame]) -> None:
        try:
            tables[name] = make()
        except InputError as error:
            reasons.append(error)

    if len(request.sparsities) < 2:
        return tables, reasons  # points, not curves
    attempt("auc", lambda: statistics.areas(curves, request.methods))
    attempt("weights", lambda: statistics.weight_sweeps(curves))
    attempt("rules", lambda: statistics.rule_ablation(curves, request.methods))
    if "auc" in tables:
        tables["gaps"] = statistics.gaps(tables["auc"])
        tables["signs"] = statistics.sign_summary(tables["gaps"])
        tables["selector"] = statistics.select_leave_one_out(tables["auc"])
    return tables, reasons


def write_derived(folder: Path, tables: dict[str, pd.DataFrame]) -> None:
    """Writes the derived tables and removes those of an earlier sweep that this one does not have."""
    for name in DERIVED:
        if name in tables and len(tables[name]):
            write_parquet(folder / f"{name}.parquet", tables[name])
        else:
            (folder / f"{name}.parquet").unlink(missing_ok=True)
