"""What a run with stages does: the stages, the repairs between them, the hand-over; the callback says when."""

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table
from torch import nn

from lit_prune.errors import InputError
from lit_prune.models.weights import load_state
from lit_prune.preparation import Preparation
from lit_prune.progress import terminal
from lit_prune.structure.record import note_record, record_of
from lit_prune.structure.tracing import copy_network
from lit_prune.train.distillation import Repair
from lit_prune.train.figures import Figures
from lit_prune.train.hand_over import load_teacher, save_teacher, weights_of, write_compact
from lit_prune.train.phase_optimizer import PhaseOptimizer
from lit_prune.train.phases import Phases, total_epochs
from lit_prune.train.run_record import write_stages
from lit_prune.train.stage_record import (
    describe_record,
    figures_of,
    format_figure,
    log_figures,
    log_stage,
    open_record,
)
from lit_prune.train.stages import BlockStage, Stage
from lit_prune.train.subject import Subject, memory_format_of
from lit_prune.train.surgeon import Surgeon
from lit_prune.train.teaching import Lesson, Teaching
from lit_prune.train.trainer_state import datamodule_of


class StagedRun(Callback):
    """The state of a run with stages, and what is done in it.

    Attributes:
        stages: in the order of their epochs.
        repair: weights and form of the distillation terms.
        figures: the figure of the run, measured.
        phase_optimizer: of the repairs.
        teaching: the distillation.
        surgeon: plans and cuts.
        tolerance: how much worse than the dense network a repair may end; None: however much.
        dense: figures of the dense network, plain values.
        records: one a stage done, plain values.
        phases: when phases begin and end.
        run: identifier of the run.
    """

    stages: tuple[Stage, ...]
    repair: Repair
    figures: Figures
    phase_optimizer: PhaseOptimizer
    teaching: Teaching
    surgeon: Surgeon
    tolerance: float | None

    def __init__(self) -> None:
        super().__init__()
        self.met: Subject | None = None

    @property
    def subject(self) -> Subject:
        """The network that the run is about. RuntimeError: `setup` has not met it yet."""
        if self.met is None:
            raise RuntimeError("StagedPruning has no network before setup")
        return self.met

    def _forget(self) -> None:
        """A run begins."""
        self.dense: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self.phases = Phases(tuple(stage.epoch for stage in self.stages))
        self.run = new_run()
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
        """Sets the share of free blocks that the block stages remove. InputError: there is no such stage."""
        if not any(isinstance(stage, BlockStage) for stage in self.stages):
            raise InputError("a sweep over ratios needs a BlockStage in StagedPruning")
        self.stages = tuple(
            BlockStage(stage.epoch, ratio) if isinstance(stage, BlockStage) else stage for stage in self.stages
        )

    @property
    def failed(self) -> bool:
        """Whether the last finished repair ended below the tolerance."""
        if self.tolerance is None or not self.records:
            return False
        return self.figures.loss_of(self.dense["value"], figures_of(self.records[-1])["after_repair"]) > self.tolerance

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
        teacher = teacher.to(parameter.device, parameter.dtype).to(memory_format=layout)
        progress = lambda: (trainer.current_epoch - self.phases.start, self._phase(trainer)[1] or 1)  # noqa: E731
        self.teaching.begin(module, Lesson(subject.network, teacher, plans, subject.example, progress))

    def _measure_repair(self, trainer: Trainer) -> None:
        self._measured = trainer.current_epoch + 1
        if not self.records:
            return
        figures_of(self.records[-1])["after_repair"] = self.figures.measure(trainer, self.subject.path)
        log_figures(trainer, {"after_repair": self._repaired}, "stage")
        if trainer.is_global_zero:
            write_stages(Path(trainer.default_root_dir), self.records)

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
        preparation = getattr(datamodule_of(trainer), "preparation", None)
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
        load_state(network, weights_of(self._checkpoint(trainer, held), self.subject.path))
        record = record_of(self.subject.network)
        return note_record(network, replace(record, plans=record.plans[:plans]))


def new_run() -> str:
    """An identifier that no other run has."""
    return uuid.uuid4().hex[:12]
