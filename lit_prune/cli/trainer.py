"""Lightning's Trainer with the project's verbs."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prune.data import ImageData
from lit_prune.errors import InputError
from lit_prune.lab.analyze.request import AnalyzeRequest
from lit_prune.lab.analyze.run import analyze_run
from lit_prune.lab.curve.run import curve_run
from lit_prune.lab.curve.table import CurveRequest
from lit_prune.lab.lesion.request import LesionRequest
from lit_prune.lab.lesion.run import lesion_run
from lit_prune.lab.reduce.request import ReduceRequest
from lit_prune.lab.reduce.run import Setup, reduce_run
from lit_prune.lab.sensitivity.run import sensitivity_run
from lit_prune.lab.sensitivity.table import Asked
from lit_prune.lab.sweep.request import SweepRequest
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

    def analyze(
        self,
        model: LitClassifier,
        datamodule: ImageData,
        request: AnalyzeRequest = AnalyzeRequest(),  # noqa: B008  (frozen)
        compare: list[str] | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Channel and layer tables of a trained network, with the extras and controls asked for.

        Reads the calibration images of the data; writes `channels.parquet`, `layers.parquet`, `analysis/` and the key
        `analyze` of `run.json` in the run folder, and nothing else there. An extra that is there already for the same
        network, images and settings is not computed again. One process, on the first device.

        Args:
            model: the network; its weights come from `ckpt_path`, else from `--model.weights` or `--model.pretrained`,
                else from `checkpoints/last.ckpt` of the run folder.
            datamodule: the images it was trained on.
            request: extras and settings.
            compare: run folders analysed before; one table of layer statistics over these and this run, with bootstrap
                intervals over runs and means without each architecture, goes to `comparison.parquet`.
            ckpt_path: checkpoint of a `fit`, pruned or not.
        """
        analyze_run(self, model, datamodule, request, compare or [], ckpt_path)

    def sensitivity(
        self,
        model: LitClassifier,
        datamodule: ImageData,
        request: Asked = Asked(),  # noqa: B008  (frozen)
        ckpt_path: str | None = None,
    ) -> None:
        """One layer at a time at several widths: the figure after the cut, and with the readers solved again.

        Nothing is trained. Writes `sensitivity.parquet` and the key `sensitivity` of `run.json`. One process.

        Args:
            model: the network; its weights come from `ckpt_path`, else from `--model.weights` or `--model.pretrained`,
                else from `checkpoints/last.ckpt` of the run folder.
            datamodule: calibration images, and the validation split that the figure is of.
            request: widths, score, groups.
            ckpt_path: checkpoint of a `fit`, pruned or not.
        """
        sensitivity_run(self, model, datamodule, request, ckpt_path)

    def curve(
        self,
        model: LitClassifier,
        datamodule: ImageData,
        request: CurveRequest = CurveRequest(),  # noqa: B008  (frozen)
        ckpt_path: str | None = None,
    ) -> None:
        """What seconds buy: the accuracy at several budgets, without training and after growing times of repair.

        Writes `curve.parquet`, the key `curve` of `run.json`, and the network of every point in a compact folder below
        `curve/`. A point whose folder is there for the same network, images and settings is not computed again. One
        process.

        Args:
            model: the network; its weights come from `ckpt_path`, else from `--model.weights` or `--model.pretrained`,
                else from `checkpoints/last.ckpt` of the run folder.
            datamodule: calibration images, training images to repair on, and the validation split that the figure is
                of.
            request: budgets, seconds of repair.
            ckpt_path: checkpoint of a `fit`, pruned or not.
        """
        curve_run(self, model, datamodule, request, ckpt_path)

    def sweep(
        self,
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
            model: the network; its weights come from `checkpoints`, else from `--model.weights` or
                `--model.pretrained`, else from `checkpoints/last.ckpt` of the run folder.
            datamodule: the images it was trained on: calibration and recovery use the training split, accuracy the
                test split.
            request: what to sweep over, and the protocol.
            checkpoints: checkpoints of a fit or files of weights, all of this backbone; several are model seeds.
        """
        sweep_run(self, model, datamodule, request, checkpoints or [])

    def lesion(
        self,
        model: LitClassifier,
        datamodule: ImageData,
        request: LesionRequest = LesionRequest(),  # noqa: B008  (frozen)
        compare: list[str] | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Sets single channels to zero, or to what their peers say of them, and measures the rise of the loss.

        Nothing is trained. Writes `lesions.parquet`, `lesions/` (what the lesions say of peers, scores and the axes)
        and the key `lesion` of `run.json` in the run folder. A layer is written when it is done, and one that is there
        already for the same network, images and settings is not computed again. One process, on the first device.

        Args:
            model: the network; its weights come from `ckpt_path`, else from `--model.weights` or `--model.pretrained`,
                else from `checkpoints/last.ckpt` of the run folder.
            datamodule: the images it was trained on: metrics and the peers' fit use the calibration images, losses the
                validation split (the test split where there is none).
            request: layers, channels and settings.
            compare: run folders with lesions; the tables of these and this run together go to `lesions/pooled/`.
            ckpt_path: checkpoint of a `fit`, pruned or not.
        """
        lesion_run(self, model, datamodule, request, compare or [], ckpt_path)

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
