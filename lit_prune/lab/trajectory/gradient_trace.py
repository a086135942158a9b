"""Watches which way each layer moves while the network trains: against both information gradients."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch import Trainer
from torch import nn

from lit_prune.arguments import checked
from lit_prune.files import read_parquet, write_parquet
from lit_prune.lab.trajectory.directions import collect_directions, direction_table
from lit_prune.task import TARGETS, Task
from lit_prune.train.tracing import Trace, Traced, trace_folder

COSINES = ("capture_task", "update_capture", "update_task", "capture_correlation", "update_correlation")
SINGLE_TARGETS = tuple(name for name in TARGETS if name != "one_vs_rest")


@checked
class GradientTrace(Trace):
    """Writes the cosines of ∇I_X, ∇I_T, ∇ρ and the direction of descent -∇L, layer by layer, over training.

    Hooks: `on_train_start` (initialisation, skipped on resume) and `on_train_epoch_end`. Nothing is kept in the
    callback's state. The first `limit` calibration samples go twice through the network in evaluation mode, as it gets
    them in the module's validation step; each layer costs two weight-gradient passes (one of the loss), no patch is
    unfolded. L is the plain cross-entropy on these images. The training state, gradients and the random state included,
    is left as found. Under DDP the ranks share each batch and add their sums, and rank 0 writes. Supported strategies:
    one device and DDP.

    File, whole or not at all: `<default_root_dir>/trace/gradients.parquet` with epoch (finished epochs, 0 =
    initialisation) and the columns of `direction_table`. On resume the earlier epochs are kept, an
    epoch that runs again replaces its rows; a fresh fit starts anew. Logged: the means over layers,
    `trace/gradients/<cosine>`, and `trace/gradients/seconds`.

    Args:
        every_n_epochs: trace after epochs n-1, 2n-1, ... (counted from 0).
        layers: names or fnmatch patterns of the layers; None takes every Conv2d and Linear.
        target: task variable with one value an image, as in `lit_prune.measurement.channel_table`.
        limit: number of calibration samples; None takes all.
        network: path of the network in the module; None finds it, see `lit_prune.train.locate.find_path`.
        calibration: a loader, or a number of samples, to measure on; None: the DataModule's calibration samples.
        task: what batches and outputs mean, where it is not recognised.

    Raises:
        InputError: a value out of range; at the start: no network found, no calibration data, fewer samples in the
            first batch than ranks.
    """

    log_key = "trace/gradients"

    def __init__(
        self,
        every_n_epochs: int = 1,
        layers: list[str] | None = None,
        target: str | None = None,
        limit: int | None = 1000,
        network: str | None = None,
        calibration: Iterable[Any] | int | None = None,
        task: Task | str | None = None,
    ) -> None:
        super().__init__(Traced(every_n_epochs, layers, target, limit, network, calibration, task), SINGLE_TARGETS)

    def trace(self, trainer: Trainer, network: nn.Module, epoch: int) -> str:
        """Adds the ranks' sums; rank 0 writes and logs."""
        batches, task = self.samples(trainer)
        sums = collect_directions(network, batches, self.chosen.target, self.chosen.layers, task).all_reduce()
        if not trainer.is_global_zero:
            return ""
        table = direction_table(network, sums)
        table.insert(0, "epoch", epoch)
        self._write(trainer, table)
        means = {f"{self.log_key}/{name}": table[name].mean() for name in COSINES if table[name].notna().any()}
        for logger in trainer.loggers:
            logger.log_metrics(means, step=trainer.global_step)
        return f"gradients: epoch {epoch}, {len(table)} layers, {sums.images} images"

    def clear(self, folder: Path) -> None:
        """Removes the file that this callback writes."""
        (folder / "gradients.parquet").unlink(missing_ok=True)

    @staticmethod
    def _write(trainer: Trainer, table: pd.DataFrame) -> None:
        """Puts an epoch's rows in the place of earlier ones of the same epoch."""
        file = trace_folder(trainer) / "gradients.parquet"
        if file.exists():
            known = read_parquet(file)
            table = pd.concat([known[known["epoch"] != table["epoch"].iloc[0]], table], ignore_index=True)
        write_parquet(file, table.sort_values(["epoch", "depth"], kind="stable", ignore_index=True))
