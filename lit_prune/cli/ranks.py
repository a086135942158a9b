"""Several ranks under one signal."""

import os
import signal
import threading
from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer


class RanksEndAtOnce(Callback):
    """Among several ranks SIGTERM ends each at once.

    Lightning's handler tells the other ranks, which waits for ever for those that are inside a stage.
    """

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signal."""
        self._take(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signal."""
        self._take(trainer)

    def _take(self, trainer: Trainer) -> None:
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            launcher = trainer.strategy.launcher
            signal.signal(signal.SIGTERM, lambda number, _: _end_ranks(getattr(launcher, "kill", None), number))


def _end_ranks(kill: Callable[[int], None] | None, number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    if kill is not None:
        kill(number)
    os.kill(os.getpid(), number)
