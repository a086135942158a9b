"""Removes structure in stages during `fit`: plan, surgery, recalibration, distillation, record, compact model."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.files import writable
from lit_prune.progress import terminal
from lit_prune.report import result_table, terminal_verdict
from lit_prune.task import Task
from lit_prune.train.distillation import Repair
from lit_prune.train.figures import Figures
from lit_prune.train.hand_over import run_of, set_aside
from lit_prune.train.locate import check_replaceable, copies_of, find_path, told_apart, when_built
from lit_prune.train.phase_optimizer import PhaseOptimizer
from lit_prune.train.phases import check_epochs, total_epochs
from lit_prune.train.rewire import check_supported
from lit_prune.train.stage_checks import check_stages, check_teacher
from lit_prune.train.stage_record import check_done, check_metric_name, log_compact
from lit_prune.train.staged_run import StagedRun, new_run
from lit_prune.train.stages import BlockStage, ChannelStage, Stage
from lit_prune.train.subject import Subject
from lit_prune.train.surgeon import Surgeon, on_rank_zero
from lit_prune.train.teaching import Teaching
from lit_prune.train.trainer_state import callbacks_of, is_trial


@checked
class StagedPruning(StagedRun):
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
        calibration: Iterable[Any] | int | None = None,
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
        if tolerance is not None and tolerance < 0:
            raise InputError(f"tolerance={tolerance} is below 0; give how much worse than the dense network is held")
        if monitor is not None:
            check_metric_name(monitor)
        self.stages = tuple(stages)
        self.network, self.repair = network, repair
        self.figures = Figures(monitor, mode, task, calibration)
        self.phase_optimizer = PhaseOptimizer(optimizer, scheduler, repair.gradient_clip)
        self.teaching = Teaching(repair, None if teacher is None else Path(teacher))
        self.surgeon = Surgeon(self.figures, self.phase_optimizer, calibration, probe_limit, recalibration_batches)
        self.tolerance = tolerance
        self._forget()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the network, checks all that can be checked before training, wraps the module's hooks.

        Raises:
            InputError: no network found, epochs out of order or beyond the run, strategy or callback refused.
        """
        when_built(trainer, self.network, lambda: self._attach(trainer, pl_module, stage))

    def _attach(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        path = find_path(pl_module, self.network)
        if self.met is None or self.met.module is not pl_module:
            self.met = Subject(pl_module, path)
            self._forget()
        self.subject.attach()
        if stage != "fit":
            return
        check_supported(trainer)
        check_replaceable(pl_module, path)
        if self.network is None and (said := told_apart(pl_module, path)):
            rank_zero_info(said)
        self.phases.boundaries = tuple(stage.epoch for stage in self.stages)
        check_epochs(self.stages, None if is_trial(trainer) else total_epochs(trainer))
        self.phase_optimizer.attach(trainer, pl_module, lambda: self._phase(trainer))
        self._checked = is_trial(trainer)
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
        if self.met is not None:
            self.met.detach()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In a resumed run whose network is already cut: takes up distillation where it was.

        Raises:
            InputError: the module's own `setup` or `configure_model` has compiled its network; a stage that is done is
                asked for with other values.
        """
        check_replaceable(pl_module, self.subject.path)
        earlier = [self._checkpoint(trainer, done) for done in range(len(self.stages) + 1)]
        check_done(self.records, self.stages, earlier)
        if self.records:
            self._teach(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses stages that cannot be reached; a failed frontier stays stopped; a fresh run clears its folder.

        Raises:
            InputError: a stage beyond the end of the run, or one that was never done before the present epoch; a folder
                that cannot be written.
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
        check_epochs(self.stages, None if is_trial(trainer) else total)
        if not self._checked:
            self.surgeon.meet(trainer, self.subject)
            self._check_stages()
        if not is_trial(trainer):
            self.figures.check(trainer, self.subject.path)
        self._warn_of_copies(trainer, pl_module)
        self._check_late(trainer)
        run_dir = Path(trainer.default_root_dir)
        on_rank_zero(trainer, lambda: str(writable(run_dir)))
        if trainer.is_global_zero and run_of(run_dir) == self.run:
            self.run = new_run()  # what it handed over is not what it will have now
        if trainer.is_global_zero and not self.dense:
            set_aside(run_dir, self.run)

    def _check_late(self, trainer: Trainer) -> None:
        late = [s for s in self.stages[len(self.records) :] if s.epoch < trainer.current_epoch]
        if late:
            raise InputError(
                f"stage {late[0].name} at epoch {late[0].epoch} was not done, and the checkpoint is already at epoch "
                f"{trainer.current_epoch}; move the stage or resume from an earlier checkpoint"
            )

    def _warn_of_copies(self, trainer: Trainer, module: LightningModule) -> None:
        """Says that averages of the weights which somebody else keeps will not follow a cut."""
        holders: dict[str, Any] = {f"{type(module).__name__}": module}
        for callback in callbacks_of(trainer):
            if callback is not self:
                holders |= {f"{type(callback).__name__}.{key}": value for key, value in vars(callback).items()}
        for name in copies_of(self.subject.network, holders):
            rank_zero_warn(
                f"{name} holds tensors of the names and shapes of the network {self.subject.path!r}; if it follows its "
                "weights (an average, a momentum encoder), it will not fit after a cut: build it anew then"
            )

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
        if done < len(self.stages) and self.stages[done].epoch == trainer.current_epoch and not is_trial(trainer):
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
        trainer.save_checkpoint(self._checkpoint(trainer, len(self.records)), weights_only=False)
        trainer.should_stop = trainer.should_stop or self.failed

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the network of a repair that something else ended early; says which stages were not reached."""
        if self.records and self._measured != trainer.current_epoch and not self.failed:
            self._measure_repair(trainer)
        missed = [stage for stage in self.stages[len(self.records) :] if not self.failed]
        if missed and not is_trial(trainer):
            names = ", ".join(f"{stage.name} (epoch {stage.epoch})" for stage in missed)
            handed = "compact/ holds the network as it is" if self.records else "nothing was cut, there is no compact/"
            rank_zero_warn(f"the run stopped early at epoch {trainer.current_epoch}, not done: {names}; {handed}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hands over the compact model.

        Raises:
            InputError: a finished run was started again with a stage more than it had.
        """
        if not self._trained and not self.failed:
            self._check_late(trainer)
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
