"""What the tracing callbacks share: when to trace, on which images, what it costs, where the files go."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.layers import Batches


class Trace(Callback, ABC):
    """Traces the network at initialisation and after every k-th training epoch, and says what that cost.

    Hooks: `on_train_start` (initialisation, skipped on resume) and `on_train_epoch_end`; `on_train_epoch_start`,
    `on_train_batch_start` and `on_train_batch_end` keep the time that training takes. Nothing is kept in the
    callback's state.

    Args:
        every_n_epochs: trace after epochs n-1, 2n-1, ... (counted from 0).
        layers: names or fnmatch patterns of the layers; None takes every Conv2d and Linear.
        target: task variable, as in `lit_prune.measurement.channel_table`.
        limit: number of calibration images; None takes all.
        targets: task variables to choose from.

    Raises:
        InputError: a value out of range.
    """

    def __init__(
        self, every_n_epochs: int, layers: list[str] | None, target: str, limit: int | None, targets: Sequence[str]
    ) -> None:
        if every_n_epochs < 1:
            raise InputError(f"every_n_epochs: {every_n_epochs} is below 1")
        if limit is not None and limit < 1:
            raise InputError(f"limit: {limit} is below 1; give a number of images, or None for all")
        if target not in targets:
            raise InputError(f"target: {target!r} is not one of {', '.join(targets)}")
        self.every_n_epochs = every_n_epochs
        self.layers = layers
        self.target = target
        self.limit = limit
        self._began: float | None = None
        self._trained = 0.0

    @abstractmethod
    def trace(self, trainer: Trainer, backbone: nn.Module, epoch: int) -> str:
        """Traces the network after `epoch` finished epochs, on every rank; says on rank 0 what was traced."""

    @abstractmethod
    def clear(self, folder: Path) -> None:
        """Removes the trace of an earlier run from `trace/`, which would mix with the new one."""

    @property
    @abstractmethod
    def log_key(self) -> str:
        """Prefix of what is logged."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Traces the initialisation of a fresh fit."""
        if is_fresh(trainer):
            if trainer.is_global_zero:
                self.clear(trace_folder(trainer))
            self._timed(trainer, pl_module, epoch=0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock until the first batch: a stage at the epoch's start is not training."""
        self._began = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Starts the clock of the epoch."""
        if self._began is None:
            self._began = self._trained = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Reads the clock; what comes after the last batch is not training."""
        self._trained = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Traces the state after every `every_n_epochs`-th epoch."""
        finished = trainer.current_epoch + 1
        if finished % self.every_n_epochs == 0:
            self._timed(trainer, pl_module, epoch=finished)

    def _timed(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        """Traces, logs the seconds, prints them with their share of the epoch's training."""
        start = time.perf_counter()
        said = self.trace(trainer, backbone_of(self, pl_module), epoch)
        seconds = time.perf_counter() - start
        training = 0.0 if self._began is None else self._trained - self._began
        share = f", {seconds / training:.0%} of the epoch's training" if epoch and training > 0 else ""
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics({f"{self.log_key}/seconds": seconds}, step=trainer.global_step)
        rank_zero_info(f"{said}, {seconds:.2f} s{share}")


def share_batches(batches: Batches, rank: int, ranks: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's images of each batch, every `ranks`-th one, of the first `limit` images of the same batches.

    Raises:
        InputError: on every rank, if the first batch has fewer images than there are ranks.
    """
    seen = 0
    for images, labels in batches:
        kept = len(images) if limit is None else min(len(images), limit - seen)
        if seen == 0 and kept < ranks:
            raise InputError(f"calibration: {kept} images in the first batch for {ranks} ranks; make it larger")
        seen += kept
        if rank < kept:
            yield images[:kept][rank::ranks], labels[:kept][rank::ranks]
        if seen == limit:
            return


def is_fresh(trainer: Trainer) -> bool:
    """Whether the fit starts at its first epoch and not from a checkpoint."""
    return trainer.current_epoch == 0 and trainer.ckpt_path is None


def trace_folder(trainer: Trainer) -> Path:
    """`trace/` in the run folder."""
    return Path(trainer.default_root_dir) / "trace"


def calibration_batches(callback: Callback, trainer: Trainer, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the first `limit` calibration images of the DataModule.

    Raises:
        InputError: the run has no calibration data.
    """
    data = getattr(trainer, "datamodule", None)
    if not hasattr(data, "calibration_dataloader"):
        name = type(callback).__name__
        raise InputError(f"{name}: no calibration data; fit with a DataModule that has calibration_dataloader()")
    return share_batches(data.calibration_dataloader(), trainer.global_rank, trainer.world_size, limit)


def backbone_of(callback: Callback, pl_module: LightningModule) -> nn.Module:
    """The network of a LightningModule, without what torch.compile wraps around it.

    Raises:
        InputError: it has no `backbone`.
    """
    backbone = getattr(pl_module, "backbone", None)
    if not isinstance(backbone, nn.Module):
        names = type(callback).__name__, type(pl_module).__name__
        raise InputError(f"{names[0]}: {names[1]} has no `backbone`; name its network so")
    return getattr(backbone, "_orig_mod", backbone)
