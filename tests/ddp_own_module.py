"""Somebody's own module on two processes; both ranks run this file: python tests/ddp_own_module.py FOLDER [KILL_AT]."""

import json
import os
import sys
from pathlib import Path

import lightning_modules as modules
from ddp_callbacks import RankChecksums
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import loaders, trainer

from lit_prune import AxisTrace, ChannelStage, Decorrelation, Repair, StagedPruning


class Kill(Callback):
    """Ends the process hard in the middle of an epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == int(sys.argv[2]):
            os._exit(3)


def main(folder: Path) -> None:
    """Three epochs with a stage in the second, traced and regularised; goes on from the last checkpoint."""
    seed_everything(1, verbose=False)
    stage = ChannelStage(0.6, 1, score="taylor", replace="constant")
    pruning = StagedPruning([stage], monitor="val/acc", recalibration_batches=2, repair=Repair(ramp=False))
    keep = ModelCheckpoint(folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    callbacks = [AxisTrace(limit=32), Decorrelation(), pruning, RankChecksums(), keep]
    callbacks += [Kill()] if len(sys.argv) > 2 else []
    last = folder / "last.ckpt"
    fit = trainer(folder, *callbacks, devices=2, strategy="ddp", enable_checkpointing=True)
    kind = getattr(modules, os.environ.get("MODULE", "Classifier"))
    fit.fit(kind(), *loaders(), ckpt_path=last if last.exists() else None, weights_only=True)
    if fit.is_global_zero:
        (folder / "records.json").write_text(json.dumps([{**r, "seconds": 0} for r in pruning.records]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
