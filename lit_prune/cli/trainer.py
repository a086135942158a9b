"""Lightning's Trainer with the project's verbs."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prune.data import ImageData
from lit_prune.errors import InputError
from lit_prune.lab.analyze.run import analyze_run
from lit_prune.lab.curve.run import curve_run
from lit_prune.lab.lesion.run import lesion_run
from lit_prune.lab.reduce.request import ReduceRequest
from lit_prune.lab.reduce.run import Setup, reduce_run
from lit_prune.lab.sensitivity.run import sensitivity_run
from lit_prune.lab.sweep.run import sweep_run
from lit_prune.train.classifier import LitClassifier
from lit_prune.train.trainer_state import callbacks_of


@runtime_checkable
class StagedCallback(Protocol):
    """A callback that removes structure in stages and can be told to begin at once."""

    def begin_at_once(self, repair_epochs: int) -> int:
        """Moves the stages to epochs 0, E, 2E, ... with E = `repair_epochs`; returns the epochs needed in all."""
        ...


def last_checkpoint(run_dir: Path) -> ModelCheckpoint:
    """Callback that keeps `checkpoints/last.ckpt` at every epoch end: what an interrupted run resumes from."""
    return ModelCheckpoint(
        run_dir / "checkpoints",
        filename="last",
        save_top_k=1,
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )


class Trainer(pl.Trainer):
    """`lightning.pytorch.Trainer`, plus the verbs that start from a trained network."""

    def compress(
        self,
        model: LitClassifier,
        datamodule: ImageData,
        repair_epochs: int = 5,
        ratios: list[float] | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Trained network and a budget in, repaired compact model out: the stages of a pruning callback, at once.

        The stages come from the `lit_prune.StagedPruning` of the configuration (`configs/prune/`), the trained weights
        from `--model.weights` or `--model.pretrained`.

        Args:
            model: the trained network.
            datamodule: the images it was trained on.
            repair_epochs: epochs of repair after each stage.
            ratios: schedule sweep: one run in its own folder for each share of blocks removed, such as
                `[0.1, 0.25, 0.4, 0.5]`, and one table of all. None: a single run.
            ckpt_path: checkpoint of an interrupted compression to go on from; found by itself in the run folder.
        """
        staged = [callback for callback in callbacks_of(self) if isinstance(callback, StagedCallback)]
        if len(staged) != 1:
            raise InputError(
                f"compress needs one StagedPruning callback, found {len(staged)}: add -c configs/prune/refit.yaml"
            )
        if not model.is_trained:
            raise InputError("compress needs a trained network: give --model.weights FILE or --model.pretrained true")
        if repair_epochs < 1:
            raise InputError(f"compress needs repair_epochs >= 1, got {repair_epochs}")
        self.fit_loop.max_epochs = staged[0].begin_at_once(repair_epochs)
        self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)

    analyze = analyze_run
    sensitivity = sensitivity_run
    sweep = sweep_run
    lesion = lesion_run
    curve = curve_run

    def reduce(
        self,
        model: LitClassifier,
        datamodule: ImageData,
        request: ReduceRequest = ReduceRequest(),  # noqa: B008  (frozen)
        ckpt_path: str | None = None,
    ) -> None:
        """Mechanism replacement: score, keep, compile, verify by interchange, perhaps train on; tables of it all.

        Writes `reduction.json` in the run folder after every cell (method, width, calibration size, seed); a cell that
        is there already for the same network, images and settings is not computed again; each request keeps its own
        tables. The narrowest network within a point of the dense accuracy (else the most accurate) goes to `compact/`.

        Args:
            model: the network; its weights come from `ckpt_path`, else from `--model.weights` or `--model.pretrained`,
                else from `checkpoints/last.ckpt` of the run folder. Where there are none, one network a seed is trained
                first, in the folder `seed=N` of the run folder, as `fit` would.
            datamodule: calibration and test images.
            request: layer, widths, methods, seeds.
            ckpt_path: checkpoint of a `fit`, pruned or not.
        """
        reduce_run(Setup(self, model, datamodule, ckpt_path), request)
