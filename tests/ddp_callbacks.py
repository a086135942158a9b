"""Callbacks that the two-process runs name in their configuration."""

import json
import os
from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from lit_prune.train.rewire import parameter_checksum


class RankChecksums(Callback):
    """Every rank writes the checksum of its parameters after each epoch, before ranks could be synchronised again."""

    def __init__(self) -> None:
        self.checksums: list[int] = []

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        parameters = {name: p for name, p in pl_module.named_parameters()}
        holder = _Parameters(parameters)
        self.checksums.append(parameter_checksum(holder))
        file = Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.json"
        file.write_text(json.dumps(self.checksums))


class _Parameters:
    def __init__(self, parameters: dict) -> None:
        self.parameters = parameters

    def state_dict(self) -> dict:
        return self.parameters


class KillOnRequest(Callback):
    """Ends the process hard in the middle of the epoch that the environment names, on every rank."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if os.environ.get("KILL_AT_EPOCH") == str(trainer.current_epoch):
            os._exit(3)


class SayWhere(Callback):
    """Every rank writes its process number when it is at the point that the environment names: `stage` or `epoch`."""

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if os.environ.get("SAY_WHERE") == "stage" and trainer.current_epoch == 2:
            self._say(trainer)  # the stage of this epoch comes next, or just went by on a rank that was faster

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if os.environ.get("SAY_WHERE") == "epoch" and (trainer.current_epoch, batch_idx) == (1, 1):
            self._say(trainer)

    def _say(self, trainer) -> None:
        (Path(trainer.default_root_dir) / f"where{trainer.global_rank}").write_text(str(os.getpid()))


class SkipWrappingOnRequest(Callback):
    """Leaves the network bare when the strategy is set up for the second time, as code without `rewired` would."""

    def on_train_start(self, trainer, pl_module) -> None:
        if os.environ.get("SKIP_WRAPPING"):
            DDPStrategy.configure_ddp = lambda strategy: None
