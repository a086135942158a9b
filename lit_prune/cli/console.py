"""What a training verb shows: a bar on a terminal, one line an epoch elsewhere; and how its ranks end."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, RichProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class Bar(RichProgressBar):
    """Lightning's bar without the number of the logger's version, which is a word here."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class Size(ModelSummary):
    """The parameters of the network in a line; what a stage leaves is in the tables."""

    @staticmethod
    def summarize(summary_data: Any, total_parameters: int, trainable_parameters: int, *_: Any, **__: Any) -> None:
        """Prints the line."""
        print(f"network: {total_parameters:,} parameters, {trainable_parameters:,} trainable")


class EpochLines(Callback):
    """One line an epoch, for logs and pipes: what was logged for the bar, the learning rate, seconds."""

    def __init__(self) -> None:
        self._began = 0.0
        self._epoch: int | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the line of the epoch before, whose figures are all there now, and starts the clock."""
        self._print(trainer)
        self._epoch, self._began = trainer.current_epoch, time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the line of the last epoch."""
        self._print(trainer)

    def _print(self, trainer: Trainer) -> None:
        if self._epoch is None or not trainer.is_global_zero:
            return
        figures = {name: float(value) for name, value in trainer.progress_bar_metrics.items() if name != "v_num"}
        said = "  ".join(f"{name} {value:.4g}" for name, value in (figures | rates(trainer)).items())
        seconds = time.perf_counter() - self._began
        print(f"epoch {self._epoch + 1}/{trainer.max_epochs}  {said}  {seconds:.1f} s", flush=True)
        self._epoch = None


class LearningRate(Callback):
    """Logs `learning_rate` (`learning_rate/1`, ... of further groups) to whatever loggers there are, once an epoch."""

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs it."""
        for logger in trainer.loggers:
            logger.log_metrics(rates(trainer) | {"epoch": trainer.current_epoch}, step=max(trainer.global_step - 1, 0))


def rates(trainer: Trainer) -> dict[str, float]:
    """The learning rate of every parameter group; one name where all are the same."""
    found = [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if len(set(found)) == 1:
        found = found[:1]
    return {"learning_rate" + (f"/{place}" if place else ""): rate for place, rate in enumerate(found)}


def shown(callbacks: Sequence[Callback], settings: Any) -> tuple[list[Callback], dict[str, Any]]:
    """Callbacks that show a training run, and the trainer's settings that go with them.

    What the configuration asks for itself stays as it is: a bar or summary among the callbacks, or one switched off.
    """
    added: list[Callback] = []
    changed: dict[str, Any] = {}
    if settings.get("barebones") or settings.get("fast_dev_run"):
        return added, changed
    if settings.get("enable_model_summary") is not False and not _has(callbacks, ModelSummary):
        added.append(Size())
    if settings.get("enable_progress_bar") is not False and not _has(callbacks, ProgressBar):
        on_terminal = sys.stdout.isatty()
        added.append(Bar() if on_terminal else EpochLines())
        changed = {} if on_terminal else {"enable_progress_bar": False}
    return added, changed


def _has(callbacks: Sequence[Callback], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


class RanksEndAtOnce(Callback):
    """Among several ranks SIGTERM ends each at once.

    Lightning's handler tells the other ranks, which waits for ever for those that are inside a stage.
    """

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signal."""
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            launcher = trainer.strategy.launcher
            signal.signal(signal.SIGTERM, lambda number, _: _end_ranks(getattr(launcher, "kill", None), number))

    on_train_start = on_sanity_check_start


def _end_ranks(kill: Callable[[int], None] | None, number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    if kill is not None:
        kill(number)
    os.kill(os.getpid(), number)
