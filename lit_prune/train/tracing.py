"""What the tracing callbacks share: when to trace, on which samples, what it costs, where the files go."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lit_prune.errors import InputError
from lit_prune.task import Task, find_task
from lit_prune.train.capture import Seen
from lit_prune.train.locate import find_path, network_at, when_built
from lit_prune.train.module_task import ModuleTask, task_in
from lit_prune.train.own_forward import release
from lit_prune.train.samples import Samples, calibration_samples, check_calibration


class Trace(Callback, ABC):
    """Traces the network at initialisation and after every k-th training epoch, and says what that cost.

    For any LightningModule. Hooks: `setup` (finds the network), `on_train_start` (initialisation, skipped on resume)
    and `on_train_epoch_end`; `on_train_epoch_start`, `on_train_batch_start` and `on_train_batch_end` keep the time that
    training takes. Nothing is kept in the callback's state.

    Raises:
        InputError: a value out of range.
    """

    def __init__(self, chosen: "Traced", targets: Sequence[str]) -> None:
        if chosen.every_n_epochs < 1:
            raise InputError(f"every_n_epochs: {chosen.every_n_epochs} is below 1")
        if chosen.limit is not None and chosen.limit < 1:
            raise InputError(f"limit: {chosen.limit} is below 1; give a number of samples, or None for all")
        if chosen.task is None and chosen.target is not None and chosen.target not in targets:
            raise InputError(f"target: {chosen.target!r} is not one of {', '.join(targets)}")
        check_calibration(chosen.calibration)
        self.chosen = chosen if chosen.task is None else replace(chosen, task=find_task(chosen.task))
        self.path = ""
        self._began: float | None = None
        self._trained = 0.0
        self._said = False

    @abstractmethod
    def trace(self, trainer: Trainer, network: nn.Module, epoch: int) -> str:
        """Traces the network after `epoch` finished epochs, on every rank; says on rank 0 what was traced."""

    @abstractmethod
    def clear(self, folder: Path) -> None:
        """Removes the trace of an earlier run from `trace/`, which would mix with the new one."""

    @property
    @abstractmethod
    def log_key(self) -> str:
        """Prefix of what is logged."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the network. InputError: there is none, or more than one that it could be."""

        def find() -> None:
            self.path = find_path(pl_module, self.chosen.network)

        when_built(trainer, self.chosen.network, find)

    def samples(self, trainer: Trainer) -> tuple[Iterator[Seen], Task]:
        """This rank's share of the calibration samples, as the network gets them, and what they mean."""
        found = calibration_samples(trainer, self.path, self.chosen.calibration)
        first = found.first()
        task = task_in(trainer, self.path, first, self.chosen.task)
        if isinstance(task, ModuleTask) and task.refusal and not self._said:
            self._said = True
            rank_zero_warn(
                f"{type(self).__name__}: without a loss of each sample, what needs one is NaN; {task.refusal}"
            )
        return share_samples(found, trainer.global_rank, trainer.world_size, self.chosen.limit), task

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Traces the initialisation of a fit that starts at its first epoch and not from a checkpoint."""
        if trainer.current_epoch == 0 and trainer.ckpt_path is None:
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
        if finished % self.chosen.every_n_epochs == 0:
            self._timed(trainer, pl_module, epoch=finished)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the module's call as it was."""
        release(pl_module)

    def _timed(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        """Traces, logs the seconds, prints them with their share of the epoch's training."""
        start = time.perf_counter()
        with isolate_rng():
            said = self.trace(trainer, network_at(pl_module, self.path), epoch)
        seconds = time.perf_counter() - start
        training = 0.0 if self._began is None else self._trained - self._began
        share = f", {seconds / training:.0%} of the epoch's training" if epoch and training > 0 else ""
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics({f"{self.log_key}/seconds": seconds}, step=trainer.global_step)
        rank_zero_info(f"{said}, {seconds:.2f} s{share}")


@dataclass(frozen=True)
class Traced:
    """What a trace is of, and when; the fields are said of `AxisTrace`."""

    every_n_epochs: int
    layers: list[str] | None
    target: str | None
    limit: int | None
    network: str | None
    calibration: Iterable[Any] | int | None
    task: Task | str | None


def share_samples(samples: Samples, rank: int, ranks: int, limit: int | None = None) -> Iterator[Seen]:
    """This rank's part of the first `limit` samples: every `ranks`-th of each batch where all ranks read the same.

    Raises:
        InputError: on every rank, if the first batch has fewer samples than there are ranks.
    """
    if not samples.shared:  # each rank has its own already
        own = samples.limit if limit is None else min(samples.limit or limit, -(-limit // ranks))
        yield from replace(samples, limit=own)
        return
    for place, seen in enumerate(replace(samples, limit=limit if samples.limit is None else samples.limit)):
        size = seen.size
        if place == 0 and size < ranks:
            raise InputError(f"calibration: {size} samples in the first batch for {ranks} ranks; make it larger")
        if rank < size:
            yield seen if ranks == 1 else seen.take(slice(rank, None, ranks))


def trace_folder(trainer: Trainer) -> Path:
    """`trace/` in the run folder."""
    return Path(trainer.default_root_dir) / "trace"
