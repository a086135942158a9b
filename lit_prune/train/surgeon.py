"""Carries a stage out on the network of a running `fit`: one plan for all ranks, the cut, new statistics, figures."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from lit_prune.errors import InputError
from lit_prune.replace import find_stand_in
from lit_prune.structure import Plan, cost
from lit_prune.task import Task, Unlabelled
from lit_prune.train.batchnorm import recalibrate_batchnorm
from lit_prune.train.figures import Figures
from lit_prune.train.module_task import SeenTask, task_in
from lit_prune.train.phase_optimizer import PhaseOptimizer
from lit_prune.train.rewire import begin_anew, rewired, share_state
from lit_prune.train.samples import Kept, Samples, calibration_samples, recalibration_samples
from lit_prune.train.stage_plans import Probe, cut, dense_costs, plan_stage
from lit_prune.train.stage_record import figures_of, note_cost, plain
from lit_prune.train.stages import Stage, budgets_of
from lit_prune.train.subject import Subject

RECALIBRATION_BATCHES = 50


@dataclass(frozen=True)
class Surgeon:
    """How stages are carried out.

    Attributes:
        figures: what the network is judged by.
        optimizer: whether optimizers go on.
        calibration: a loader, a number of samples, or None, see `calibration_samples`.
        probe_limit: samples at the most that block information is measured on.
        recalibration_batches: training batches for new BatchNorm statistics; None: 50, but
            none after `refit`, which has put the statistics right.
    """

    figures: Figures
    optimizer: PhaseOptimizer
    calibration: Any
    probe_limit: int
    recalibration_batches: int | None

    def meet_dense(self, trainer: Trainer, subject: Subject) -> dict[str, Any]:
        """Figures of the dense network, as it is and recalibrated, as plain values; it is left as found."""
        self.meet(trainer, subject)
        counted = cost(subject.network, subject.example)
        value = self.figures.measure(trainer, subject.path)
        statistics = {name: buffer.clone() for name, buffer in subject.network.named_buffers()}
        self._recalibrate(trainer, subject, self._limit(None))
        recalibrated = self.figures.measure(trainer, subject.path)
        for name, buffer in subject.network.named_buffers():
            buffer.copy_(statistics[name])
        return {
            "metric": {"name": self.figures.name, "mode": self.figures.mode, "images": self.figures.images},
            "value": value,
            "recalibrated": recalibrated,
            "macs": counted.macs,
            "params": counted.params,
            "plans": len(subject.plans),
        }

    def meet(self, trainer: Trainer, subject: Subject) -> None:
        """Notes what the network is called with, where that is not known yet."""
        if subject.inputs is None:
            seen = self._samples(trainer, subject).first()
            subject.meet_inputs(task_in(trainer, subject.path, seen, self.figures.task).inputs(seen.first(1)))

    def carry_out(self, trainer: Trainer, subject: Subject, stage: Stage, record: dict[str, Any]) -> None:
        """Plans and cuts on every rank, and completes the record."""
        samples = Kept(self._samples(trainer, subject))
        task = task_in(trainer, subject.path, samples.first(), self.figures.task)
        note_cost(record, cost(subject.network, subject.example), "before")
        with _timed(record, "plan"):
            made = on_rank_zero(trainer, lambda: self._plan(subject, stage, samples, task, record).to_dict())
            plan = Plan.from_dict(made)
        with rewired(trainer, subject.slice_tensors(plan) if self.optimizer.continues else None):
            with _timed(record, "surgery"):
                network, plan = cut(subject.network, plan, stage, samples, subject.example, task)
                subject.put(network, plan)
                share_state(trainer, subject.network)  # stand-ins are fitted to the samples of rank 0
            figures_of(record)["after_surgery"] = self.figures.measure(trainer, subject.path)
            limit = self._limit(stage)
            with _timed(record, "recalibration"):
                self._recalibrate(trainer, subject, limit)
            figures = figures_of(record)
            same = figures["after_surgery"]
            figures["after_recalibration"] = self.figures.measure(trainer, subject.path) if limit else same
        note_cost(record, cost(subject.network, subject.example), "after")
        record["plan"] = plan.to_dict()
        record["protocol"] = {
            "stage": plain(stage.to_dict()),
            "optimizer": self.optimizer.description,
            "removal": "physical",
            "recalibration_batches": limit,
            "probe_limit": self.probe_limit,
            "calibration": samples.origin,
            "forgot_best": begin_anew(trainer),
        }

    def _samples(self, trainer: Trainer, subject: Subject) -> Samples:
        return calibration_samples(trainer, subject.path, self.calibration)

    def _plan(self, subject: Subject, stage: Stage, samples: Kept, task: Task, record: dict[str, Any]) -> Plan:
        dense = {name: record[name]["dense"] for name in ("macs", "params")}
        further = [name for name in budgets_of([stage]) if name not in dense]
        if further:
            base = subject.before(len(subject.plans) - record["stage"]).to(next(subject.network.parameters()).device)
            dense |= dense_costs(base, subject.example, further)
        return plan_stage(subject.network, stage, samples, dense, Probe(subject.example, task, self.probe_limit))

    def _limit(self, stage: Stage | None) -> int:
        """Training batches for new statistics after a stage, or of the dense network."""
        if self.recalibration_batches is not None:
            return self.recalibration_batches
        return 0 if stage is not None and find_stand_in(stage.stands_in).renews else RECALIBRATION_BATCHES

    def _recalibrate(self, trainer: Trainer, subject: Subject, limit: int) -> None:
        """New BatchNorm statistics from training batches, by rank 0 for all; nothing for 0 batches."""
        if not limit:
            return
        task = SeenTask(Unlabelled())

        def measure() -> None:
            recalibrate_batchnorm(
                subject.network, recalibration_samples(trainer, subject.path, limit), limit, task=task
            )

        if any(isinstance(part, nn.SyncBatchNorm) for part in subject.network.modules()):
            measure()  # a synchronised norm waits for the other ranks
        else:
            on_rank_zero(trainer, measure)
        share_state(trainer, subject.network)


def on_rank_zero(trainer: Trainer, make: Callable[[], Any]) -> Any:
    """What `make` gives on rank 0, plain values, on every rank. InputError: what rank 0 raised, on every rank."""
    message: dict[str, Any] = {}
    if trainer.is_global_zero:
        try:
            message = {"found": make()}
        except InputError as error:
            message = {"error": str(error)}
    heard = trainer.strategy.broadcast(message)
    if "error" in heard:
        raise InputError(heard["error"])
    return heard["found"]


@contextmanager
def _timed(record: dict[str, Any], what: str) -> Iterator[None]:
    clock = time.perf_counter()
    yield
    record["seconds"][what] = time.perf_counter() - clock
