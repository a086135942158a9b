"""Removes structure in stages during `fit`: plan, surgery, recalibration, distillation, record, compact model."""

import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from rich.table import Table
from torch import nn

from lit_prune.errors import InputError
from lit_prune.preparation import Preparation
from lit_prune.progress import terminal
from lit_prune.report import result_table, terminal_verdict
from lit_prune.structure.record import note_record, record_of
from lit_prune.structure.tracing import copy_network
from lit_prune.task import Task
from lit_prune.train.distillation import Repair
from lit_prune.train.figures import Figures
from lit_prune.train.hand_over import (
    load_teacher,
    run_of,
    save_teacher,
    set_aside,
    shortened,
    weights_of,
    write_compact,
)
from lit_prune.train.locate import check_replaceable, find_path
from lit_prune.train.logged import log_compact, log_figures, log_stage
from lit_prune.train.phase_optimizer import PhaseOptimizer
from lit_prune.train.phases import Phases, check_epochs, total_epochs
from lit_prune.train.rewire import check_supported
from lit_prune.train.run_record import write_stages
from lit_prune.train.stage_checks import check_stages, check_teacher
from lit_prune.train.stage_record import (
    check_done,
    check_metric_name,
    describe_record,
    figures_of,
    format_figure,
    open_record,
)
from lit_prune.train.stages import BlockStage, ChannelStage, Stage
from lit_prune.train.subject import Subject, memory_format_of
from lit_prune.train.surgeon import Surgeon
from lit_prune.train.teaching import Lesson, Teaching


class StagedPruning(Callback):
    """At the start of each stage's epoch: measures, plans, cuts, recalibrates; distils until the next stage.

    For any LightningModule. Rank 0 measures on the fixed calibration samples and plans; the plan travels to the other
    ranks as plain values and every rank applies it. The dense network teaches all later phases: a term is added to what
    `training_step` returns (manual optimization: `lit_prune.added_loss`). What EarlyStopping and ModelCheckpoint call
    best is forgotten at each cut. At the end of the run, however it ends, the network as it is is handed over.

    Hooks: `setup` (checks; wraps the module's checkpoint hooks and `configure_optimizers`), `on_fit_start`,
    `on_train_start`, `on_train_epoch_start` (the stages), `on_before_optimizer_step` (clipping), `on_validation_end`
    (the monitor is there), `on_train_epoch_end` (the end of a phase: figures after repair, one checkpoint),
    `on_train_end`, `on_fit_end` (the compact model), `on_exception`, `teardown`. Strategies: one device, DDP. A run
    resumed from an epoch-end checkpoint equals the uninterrupted run.
    Writes: `stages.jsonl`, `teacher/`, `checkpoints/<stage>.ckpt`, `compact/`, in `default_root_dir`.

    Args:
        stages: in the order of their epochs.
        network: path of the network in the module; None finds it, see `find_path`.
        monitor: key that validation logs, the figure in all records; None: the metric of the task on the validation
            samples.
        mode: whether more (`max`) or less (`min`) of the monitor is better.
        calibration: a loader, or a number of samples, to measure on; None: see `calibration_samples`.
        task: what batches and outputs mean, where it is not recognised.
        repair: weights and form of the distillation terms.
        optimizer: of the repair phases, with a fresh state (the paper: Adam, 1e-4). `anew` calls the module's
            `configure_optimizers` again, with `trainer.max_epochs` as long as the phase, so that its schedule fits.
            None lets the optimizers go on: momentum of kept channels, learning rates, the schedules' positions.
        scheduler: of the repair phases; None keeps the learning rate constant. Only with an `optimizer`.
        teacher: folder of a saved network (`save_compact`) to learn from; None: this run's own dense network.
        probe_limit: samples at the most that block information is measured on.
        recalibration_batches: training batches for BatchNorm recalibration; 0 leaves the statistics alone. None: 50,
            but none after a stage whose layers were solved again (`refit`): they are right already, and new ones cost
            about a point.
        tolerance: a repair that ends more than this worse than the dense network has failed: the run stops, the network
            of the last stage that held is handed over (the frontier experiment). None: never.
    """

    def __init__(
        self,
        stages: list[Stage],
        network: str | None = None,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        calibration: Any = None,
        task: Task | str | None = None,
        repair: Repair = Repair(),  # noqa: B008  (frozen)
        optimizer: OptimizerCallable | Literal["anew"] | None = None,
        scheduler: LRSchedulerCallable | None = None,
        teacher: str | None = None,
        probe_limit: int = 5000,
        recalibration_batches: int | None = None,
        tolerance: float | None = None,
    ) -> None:
        super().__init__()
        if not stages or not all(isinstance(stage, BlockStage | ChannelStage) for stage in stages):
            raise InputError(f"StagedPruning needs BlockStage and ChannelStage objects as stages, got stages={stages}")
        if probe_limit < 1 or (recalibration_batches or 0) < 0:
            raise InputError(
                f"probe_limit={probe_limit} is below 1 or recalibration_batches={recalibration_batches} below 0"
            )
        if monitor is not None:
            check_metric_name(monitor)
        self.stages = tuple(stages)
        self.network, self.repair = network, repair
        self.figures = Figures(monitor, mode, task)
        self.phase_optimizer = PhaseOptimizer(optimizer, scheduler, repair.gradient_clip)
        self.teaching = Teaching(repair, None if teacher is None else Path(teacher))
        self.surgeon = Surgeon(self.figures, self.phase_optimizer, calibration, probe_limit, recalibration_batches)
        self.tolerance = tolerance
        self.subject: Subject | None = None
        self._forget()

    def _forget(self) -> None:
        """A run begins."""
        self.dense: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self.phases = Phases(tuple(stage.epoch for stage in self.stages))
        self.run = uuid.uuid4().hex[:12]
        self._epoch_began = 0.0
        self._measured = -1
        self._trained = self._checked = False

    def state_dict(self) -> dict[str, Any]:
        """Figures of the dense network, one record a stage done, the phase's start: plain values."""
        return {"dense": self.dense, "records": self.records, "phase_start": self.phases.start, "run": self.run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.dense, self.records = state_dict["dense"], state_dict["records"]
        self.phases.start, self.run = state_dict["phase_start"], state_dict["run"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the network, checks all that can be checked before training, wraps the module's hooks.

        Raises:
            InputError: no network found, epochs out of order or beyond the run, strategy or callback refused.
        """
        path = find_path(pl_module, self.network)
        if self.subject is None or self.subject.module is not pl_module:
            self.subject = Subject(pl_module, path)
            self._forget()
        self.subject.attach()
        if stage != "fit":
            return
        check_supported(trainer)
        check_replaceable(pl_module, path)
        self.phases.boundaries = tuple(stage.epoch for stage in self.stages)
        check_epochs(self.stages, None if trainer.fast_dev_run else total_epochs(trainer))
        self.phase_optimizer.attach(trainer, pl_module, lambda: self._phase(trainer))
        self._checked = bool(trainer.fast_dev_run)
        if self.subject.inputs is not None:
            self._check_stages()

    def _check_stages(self) -> None:
        """Refuses what the stages to come, and the teacher, cannot do with the network."""
        network, example, done = self.subject.network, self.subject.example, len(self.records)
        if self._checked:
            return
        self._checked = True
        cut = check_stages(network, self.stages[done:], example, is_dense=not done)
        teacher = self.teaching.load_given() if self.teaching.wanted else None
        if teacher is not None:
            check_teacher(self.repair, teacher.to(next(network.parameters()).device), network, example, cut)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the module's methods as they were."""
        self.teaching.end(pl_module)
        self.phase_optimizer.detach(pl_module)
        if self.subject is not None:
            self.subject.detach()

    def _phase(self, trainer: Trainer) -> tuple[bool, int | None]:
        """Whether a stage has been done, and the epochs of the phase."""
        total = total_epochs(trainer)
        cut = bool(self.dense) and len(self.subject.plans) > self.dense["plans"]
        return cut, None if total is None else self.phases.length(total)

    def begin_at_once(self, repair_epochs: int) -> int:
        """Moves the stages to epochs 0, E, 2E, ... with E = `repair_epochs`; returns the epochs needed in all."""
        self.stages = tuple(stage.moved(index * repair_epochs) for index, stage in enumerate(self.stages))
        return len(self.stages) * repair_epochs

    def set_block_ratio(self, ratio: float) -> None:
        """Sets the share of free blocks that the block stages remove.

        Raises:
            InputError: there is no such stage.
        """
        if not any(isinstance(stage, BlockStage) for stage in self.stages):
            raise InputError("a sweep over ratios needs a BlockStage in StagedPruning")
        self.stages = tuple(
            BlockStage(stage.epoch, ratio) if isinstance(stage, BlockStage) else stage for stage in self.stages
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In a resumed run whose network is already cut: takes up distillation where it was."""
        if self.records:
            self._teach(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses stages that cannot be reached; a failed frontier stays stopped; a fresh run clears its folder.

        Raises:
            InputError: a stage beyond the end of the run, or one that was never done before the present epoch.
        """
        self._trained = True
        if self.failed:
            trainer.should_stop = True
            return
        total = total_epochs(trainer)
        if total is None:
            raise InputError(
                "staged pruning needs max_epochs, or max_steps and loaders of known length: phases have ends"
            )
        check_epochs(self.stages, None if trainer.fast_dev_run else total)
        check_done(self.records, self.stages)
        if not self._checked:
            self.surgeon.meet(trainer, self.subject)
            self._check_stages()
        late = [s for s in self.stages[len(self.records) :] if s.epoch < trainer.current_epoch]
        if late:
            raise InputError(
                f"stage {late[0].name} at epoch {late[0].epoch} was not done, and the checkpoint is already at epoch "
                f"{trainer.current_epoch}; move the stage or resume from an earlier checkpoint"
            )
        if trainer.is_global_zero and not self.dense:
            set_aside(Path(trainer.default_root_dir), self.run)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds out after the first validation whether the monitor is logged."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.figures.check_logged(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Clips the gradients of a repair."""
        if self.records:
            self.phase_optimizer.clip(optimizer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs the stage that is due in this epoch, if any."""
        done = len(self.records)
        if done < len(self.stages) and self.stages[done].epoch == trainer.current_epoch and not trainer.fast_dev_run:
            with isolate_rng():
                self._run(self.stages[done], trainer, pl_module)
        self.teaching.begin_epoch(pl_module)
        self._epoch_began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a phase: the figure after repair, and a checkpoint (`dense.ckpt`, then one named after each stage)."""
        if self.records:
            self.records[-1]["seconds"]["repair"] += time.perf_counter() - self._epoch_began
            self.teaching.end_epoch(pl_module, self.records[-1])
        if not self.phases.ends_after(trainer.current_epoch, total_epochs(trainer)):
            return
        self._measure_repair(trainer)
        trainer.save_checkpoint(self._checkpoint(trainer, len(self.records)))
        trainer.should_stop = trainer.should_stop or self.failed

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the network of a repair that something else ended early; says which stages were not reached."""
        if self.records and self._measured != trainer.current_epoch and not self.failed:
            self._measure_repair(trainer)
        missed = [stage for stage in self.stages[len(self.records) :] if not self.failed]
        if missed and not trainer.fast_dev_run:
            names = ", ".join(f"{stage.name} (epoch {stage.epoch})" for stage in missed)
            handed = "compact/ holds the network as it is" if self.records else "nothing was cut, there is no compact/"
            rank_zero_warn(f"the run stopped early at epoch {trainer.current_epoch}, not done: {names}; {handed}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hands over the compact model."""
        if self.records and trainer.is_global_zero:
            run_dir = Path(trainer.default_root_dir)
            done = not self._trained and run_of(run_dir) == self.run  # a finished run was started again
            terminal().print(result_table(run_dir) if done else self._hand_over(trainer))
            terminal().print(terminal_verdict(run_dir))
            if not done:
                log_compact(trainer, pl_module)
        trainer.strategy.barrier("compact")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Says that an interrupted run hands nothing over."""
        if isinstance(exception, KeyboardInterrupt) and self.records:
            rank_zero_warn("interrupted: compact/ is not written; resume from the last checkpoint to go on")

    @property
    def failed(self) -> bool:
        """Whether the last finished repair ended below the tolerance."""
        if self.tolerance is None or not self.records:
            return False
        return self.figures.loss_of(self.dense["value"], figures_of(self.records[-1])["after_repair"]) > self.tolerance

    def _measure_repair(self, trainer: Trainer) -> None:
        self._measured = trainer.current_epoch + 1
        if not self.records:
            return
        figures_of(self.records[-1])["after_repair"] = self._measure(trainer)
        log_figures(trainer, {"after_repair": self._repaired}, "stage")
        if trainer.is_global_zero:
            write_stages(Path(trainer.default_root_dir), self.records)

    def _measure(self, trainer: Trainer) -> float:
        return self.figures.measure(trainer, self.subject.path)

    def _checkpoint(self, trainer: Trainer, done: int) -> Path:
        name = f"{done}-{self.stages[done - 1].name}" if done else "dense"
        return Path(trainer.default_root_dir) / "checkpoints" / f"{name}.ckpt"

    def _hand_over(self, trainer: Trainer) -> Table:
        """Writes `compact/`; after a failed repair from the checkpoint of the last stage that held."""
        run_dir, held = Path(trainer.default_root_dir), len(self.records)
        network = self.subject.network
        if self.failed:
            trainer.strategy.checkpoint_io.teardown()  # waits for checkpoints that are still being written
            held -= 1
            network = self._held_network(trainer, held)
        preparation = getattr(trainer.datamodule, "preparation", None)
        if isinstance(preparation, Preparation):
            note_record(network, replace(record_of(network), preparation=preparation))
        dense = self.subject.before(self.dense["plans"])
        return write_compact(run_dir, network, dense, self.dense, self.records[:held], self.run)

    def _held_network(self, trainer: Trainer, held: int) -> nn.Module:
        """The network of the last stage whose repair held."""
        name = self.figures.name
        if not held:
            found, dense = (format_figure(name, v) for v in (self._repaired, self.dense["value"]))
            raise InputError(
                f"the first stage already failed its repair ({name} {found}, dense {dense}, tolerance {self.tolerance})"
                ": nothing to hand over; remove less at once"
            )
        plans = self.dense["plans"] + held
        network = self.subject.before(plans)
        network.load_state_dict(weights_of(self._checkpoint(trainer, held), self.subject.path))
        return note_record(network, shortened(record_of(self.subject.network), plans))

    @property
    def _repaired(self) -> float:
        """The figure at the end of the last repair."""
        return figures_of(self.records[-1])["after_repair"]

    def _run(self, stage: Stage, trainer: Trainer, module: LightningModule) -> None:
        """One stage, and the lesson after it."""
        if not self.dense:
            self.dense = self.surgeon.meet_dense(trainer, self.subject)
            if self.teaching.given is None and trainer.is_global_zero:
                save_teacher(Path(trainer.default_root_dir), self.subject.network)
            trainer.strategy.barrier("teacher")
        self.teaching.end(module)
        self.phases.start = trainer.current_epoch
        before = self._repaired if self.records else self.dense["value"]
        record = open_record(len(self.records), stage, self.dense, before)
        self.surgeon.carry_out(trainer, self.subject, stage, record)
        record["protocol"] |= {"repair": self.repair.to_dict(), "repair_epochs": self._phase(trainer)[1]}
        self.records.append(record)
        self._teach(trainer, module)
        record["distillation"] = self.teaching.describe()
        if trainer.is_global_zero:
            terminal().print(describe_record(record))
        log_stage(trainer, record)

    def _teach(self, trainer: Trainer, module: LightningModule) -> None:
        """Puts the teacher into the module's loss."""
        if not self.teaching.wanted:
            return
        subject, had = self.subject, self.dense["plans"]
        teacher = self.teaching.load_given()
        plans = None if teacher is not None else subject.plans[had:]
        if teacher is None:
            teacher = load_teacher(Path(trainer.default_root_dir), copy_network(subject.before(had)))
        parameter = next(subject.network.parameters())
        layout = memory_format_of(subject.network)
        teacher = teacher.to(parameter.device, parameter.dtype, memory_format=layout)
        self.teaching.begin(module, Lesson(subject.network, teacher, plans, subject.example, self._progress(trainer)))

    def _progress(self, trainer: Trainer) -> Callable[[], tuple[int, int]]:
        return lambda: (trainer.current_epoch - self.phases.start, self._phase(trainer)[1] or 1)
