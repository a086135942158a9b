"""Watches every channel on the two axes while the network trains."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lit_prune.arguments import checked
from lit_prune.files import read_parquet, write_parquet
from lit_prune.measurement.channel_table import channel_table, collect_sums, layer_table
from lit_prune.measurement.protocol import DEFAULT_PROTOCOL, Protocol
from lit_prune.measurement.summaries import coupling, rank_persistence, velocity
from lit_prune.report.axes_figures import plane_pixels
from lit_prune.task import TARGETS, Task
from lit_prune.train.tracing import Trace, Traced, trace_folder

AXES = ["input_capture", "task_information"]


@checked
class AxisTrace(Trace):
    """Writes the channel table of the network at initialisation and after every k-th training epoch.

    For any LightningModule. Hooks: `on_train_start` (initialisation, skipped on resume), `on_train_epoch_end`, and
    `on_fit_end` for the dynamics. Nothing is kept in the callback's state. The calibration samples pass the module's
    transfer hooks and its validation step up to the network, then go once through the network in evaluation mode; the
    training state, the random state included, is left as found. Under DDP the ranks share the samples and add their
    sums, and rank 0 writes. Supported strategies: one device and DDP, where each rank holds the whole network.

    Files, whole or not at all, in `<default_root_dir>/trace/`: `epoch=000.parquet` (initialisation),
    `epoch=004.parquet` (after epoch 3, counted from 0), with the columns of `lit_prune.measure` and `epoch`;
    `layers.parquet`, the coupling and the column means of each layer at each traced epoch, derived from the former;
    `dynamics.parquet` at the end of the run, see `dynamics_table`. On resume the epochs already
    written are kept, an epoch that runs again replaces its own file; a fresh fit starts the trace anew. Logged:
    `trace/<layer>/coupling`, `trace/seconds` (the time it took), and the picture `trace/plane`.

    Args:
        every_n_epochs: trace after epochs n-1, 2n-1, ... (counted from 0).
        layers: names or fnmatch patterns of the layers; None takes every Conv2d and Linear. Layers may disappear later
            as blocks are removed.
        target: task variable, as in `lit_prune.measurement.channel_table`.
        limit: number of calibration samples; None takes all.
        protocol: measurement conventions; None takes the defaults.
        plane: log a picture of three layers on the two axes, `trace/plane`, where there is a TensorBoard logger.
        network: path of the network in the module; None finds it, see `find_path`.
        calibration: a loader, or a number of samples, to measure on; None: see `calibration_samples`.
        task: what batches and outputs mean, where it is not recognised.

    Raises:
        InputError: a value out of range; at the start: no network found, no calibration data, fewer samples in the
            first batch than ranks.
    """

    log_key = "trace"

    def __init__(
        self,
        every_n_epochs: int = 1,
        layers: list[str] | None = None,
        target: str | None = None,
        limit: int | None = None,
        protocol: Protocol | None = None,
        plane: bool = True,
        network: str | None = None,
        calibration: Iterable[Any] | int | None = None,
        task: Task | str | None = None,
    ) -> None:
        super().__init__(Traced(every_n_epochs, layers, target, limit, network, calibration, task), tuple(TARGETS))
        self.protocol = protocol or DEFAULT_PROTOCOL
        self.plane = plane

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the dynamics of the trace, on rank 0; also where a resumed run had nothing left to train."""
        if trainer.is_global_zero:
            folder = trace_folder(trainer)
            files = sorted(folder.glob("epoch=*.parquet"))
            if files:
                table = dynamics_table(pd.concat([read_parquet(file) for file in files], ignore_index=True))
                write_parquet(folder / "dynamics.parquet", table)

    def trace(self, trainer: Trainer, network: nn.Module, epoch: int) -> str:
        """Adds the ranks' sums; rank 0 writes and logs."""
        (batches, task), chosen = self.samples(trainer), self.chosen
        sums = collect_sums(network, batches, chosen.target, chosen.layers, self.protocol, task).all_reduce()
        if not trainer.is_global_zero:
            return ""
        channels = channel_table(network, sums, self.protocol)
        layers = write_epoch(trace_folder(trainer), epoch, channels)
        scalars = {f"trace/{row.layer}/coupling": row.coupling for row in layers.dropna(subset="coupling").itertuples()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
            if self.plane and isinstance(logger, TensorBoardLogger):
                pixels = plane_pixels(channels, epoch)
                if pixels is not None:
                    logger.experiment.add_image("trace/plane", pixels, trainer.global_step, dataformats="HWC")
        return f"trace: epoch {epoch}, {len(layers)} layers, {sums.images} images"

    def clear(self, folder: Path) -> None:
        """Removes the files that this callback writes."""
        for file in [*folder.glob("epoch=*.parquet"), folder / "layers.parquet", folder / "dynamics.parquet"]:
            file.unlink(missing_ok=True)


def write_epoch(folder: Path, epoch: int, channels: pd.DataFrame) -> pd.DataFrame:
    """Writes one epoch's channel table, brings `layers.parquet` in line, returns this epoch's layer rows."""
    write_parquet(folder / f"epoch={epoch:03d}.parquet", channels.assign(epoch=epoch))
    file = folder / "layers.parquet"
    known = read_parquet(file) if file.exists() else pd.DataFrame({"epoch": []})
    known = known[known["epoch"] != epoch]
    missing = [path for path in sorted(folder.glob("epoch=*.parquet")) if _epoch(path) not in set(known["epoch"])]
    added = [layer_table(read_parquet(path)).assign(epoch=_epoch(path)) for path in missing]
    every = pd.concat([known, *added] if len(known) else added, ignore_index=True)
    every.insert(0, "epoch", every.pop("epoch"))
    every = every.sort_values(["epoch", "depth"], kind="stable", ignore_index=True)
    write_parquet(file, every)
    return every[every["epoch"] == epoch]


def _epoch(file: Path) -> int:
    return int(file.stem.removeprefix("epoch="))


def dynamics_table(trace: pd.DataFrame) -> pd.DataFrame:
    """Coupling, velocity and rank persistence of every layer at every traced epoch.

    Columns: epoch, layer, depth, coupling ρ(I_X, I_T); velocity ρ(ΔI_X, ΔI_T) since the traced epoch before;
    persistence_capture and persistence_task, Spearman correlations of I_X and I_T with the same channels' values at
    the layer's last traced epoch. All over channels that live at both times; NaN where not defined, so also across an
    epoch at which channels of the layer were removed, for then channels cannot be told apart by their index.

    Args:
        trace: channel tables of several epochs with the column `epoch`.

    Source: the two-axis paper, section 3.1 and figures 4A to 4C.
    """
    rows = []
    for layer, of_layer in trace.groupby("layer", sort=False):
        tables = {epoch: rows_of_epoch for epoch, rows_of_epoch in of_layer.groupby("epoch")}
        last, before = tables[max(tables)], None
        for epoch, present in tables.items():
            moved = np.nan if before is None else _or_nan(velocity, before, present)
            persistence = [_or_nan(rank_persistence, present, last, column) for column in AXES]
            rows.append([epoch, layer, present["depth"].iloc[0], coupling(present), moved, *persistence])
            before = present
    columns = ["epoch", "layer", "depth", "coupling", "velocity", "persistence_capture", "persistence_task"]
    return pd.DataFrame(rows, columns=columns).sort_values(["epoch", "depth"], kind="stable", ignore_index=True)


def _or_nan(compare: Callable[..., float], first: pd.DataFrame, second: pd.DataFrame, *more: str) -> float:
    """Result of `compare`; NaN if the layer's width differs."""
    return compare(first, second, *more) if len(first) == len(second) else np.nan
