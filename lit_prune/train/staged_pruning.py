"""Removes structure in stages during `fit`: plan, surgery, recalibration, distillation, record, compact model."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from rich.table import Table
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.progress import terminal
from lit_prune.report import result_table
from lit_prune.structure import Plan, cost, transfer_tensors
from lit_prune.structure.networks import Network
from lit_prune.train.batchnorm import recalibrate_batchnorm
from lit_prune.train.classifier import LitClassifier, Recipe
from lit_prune.train.distillation import Repair
from lit_prune.train.evaluation import Evaluation, evaluate
from lit_prune.train.rewire import check_supported, rewired
from lit_prune.train.run_record import write_compact, write_stages
from lit_prune.train.stage_record import complete_record, describe_record, open_record, plain
from lit_prune.train.stages import DenseCost, PruningStage, cut, plan_stage
from lit_prune.train.teaching import Teaching


class StagedPruning(Callback):
    """At the start of each stage's epoch: measures, plans, cuts, recalibrates; distils until the next stage.

    Rank 0 measures on the fixed calibration subset and plans; the plan travels to the other ranks as plain values and
    every rank applies it. Recalibration reads the same augmented batches on every rank. The dense network is saved
    before the first cut and teaches all later phases. At the end of the run the compact model is handed over.

    Hooks: `setup`, `on_fit_start`, `on_train_start`, `on_train_epoch_start` (the stages), `on_train_epoch_end` (the end
    of a phase: figures after repair, one checkpoint), `on_fit_end` (the compact model). Strategies: one device, DDP.
    A run resumed from an epoch-end checkpoint equals the uninterrupted run; the number of processes may change, then
    only the order of images differs.
    Writes: `stages.jsonl`, `teacher/`, `checkpoints/<stage>.ckpt`, `compact/`.

    Args:
        stages: in the order of their epochs.
        repair: weights and form of the distillation terms.
        optimizer: of the repair phases, with a fresh state (the paper: Adam, 1e-4). None lets the training optimizer
            go on: momentum of kept channels, learning rates and the schedule's position are carried over.
        scheduler: of the repair phases; None keeps the learning rate constant. Ignored where `optimizer` is None.
        teacher: folder of a saved network (`save_compact`) to learn from; None: this run's own dense network.
        probe_limit: images at the most that block information is measured on.
        recalibration_batches: augmented batches for BatchNorm recalibration; 0 leaves the statistics alone.
        tolerance: a repair that ends more than this below the dense accuracy has failed: the run stops, the network
            of the last stage that held is handed over (the frontier experiment). None: never.
    """

    def __init__(
        self,
        stages: list[PruningStage],
        repair: Repair = Repair(),  # noqa: B008  (frozen)
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        teacher: str | None = None,
        probe_limit: int = 5000,
        recalibration_batches: int = 50,
        tolerance: float | None = None,
    ) -> None:
        super().__init__()
        if not stages:
            raise InputError("StagedPruning needs at least one stage, got stages=[]")
        self.stages = tuple(stages)
        self.repair = repair
        self.optimizer, self.scheduler = optimizer, scheduler
        self._teaching = Teaching(repair, None if teacher is None else Path(teacher))
        self.probe_limit = probe_limit
        self.recalibration_batches = recalibration_batches
        self.tolerance = tolerance
        self.dense: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self._epoch_began = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Figures of the dense network and one record a stage done, as plain values."""
        return {"dense": self.dense, "records": self.records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.dense, self.records = state_dict["dense"], state_dict["records"]

    def setup(self, trainer: Trainer, pl_module: LitClassifier, stage: str) -> None:
        """Checks the schedule against the run and tells the module its phases.

        Raises:
            InputError: epochs out of order or beyond the run, no epoch left for repair, strategy or callback refused.
        """
        if stage != "fit":
            return
        check_supported(trainer)
        self._check_schedule(trainer.max_epochs)
        pl_module.phase_boundaries = tuple(stage.epoch for stage in self.stages)
        if self.optimizer is not None:
            pl_module.repair_recipe = Recipe(self.optimizer, self.scheduler, self.repair.gradient_clip)

    def begin_at_once(self, repair_epochs: int) -> int:
        """Moves the stages to epochs 0, E, 2E, ... with E = `repair_epochs`; returns the epochs needed in all."""
        self.stages = tuple(replace(stage, epoch=index * repair_epochs) for index, stage in enumerate(self.stages))
        return len(self.stages) * repair_epochs

    def set_block_ratio(self, ratio: float) -> None:
        """Sets the share of free blocks that the block stages remove.

        Raises:
            InputError: there is no such stage.
        """
        if not any(stage.kind == "blocks" for stage in self.stages):
            raise InputError("a sweep over ratios needs a stage of kind blocks in StagedPruning")
        only = {"remove_ratio": ratio, "remove_count": None, "keep_blocks": None, "keep": None}
        self.stages = tuple(replace(stage, **only) if stage.kind == "blocks" else stage for stage in self.stages)

    def _check_schedule(self, max_epochs: int | None) -> None:
        epochs = [stage.epoch for stage in self.stages]
        if any(later <= earlier for earlier, later in zip(epochs, epochs[1:], strict=False)):
            raise InputError(f"stage epochs must increase, one stage an epoch, got {epochs}")
        if not max_epochs or max_epochs < 0:
            raise InputError("staged pruning needs --trainer.max_epochs: repair phases are counted in epochs")
        if epochs[-1] >= max_epochs:
            raise InputError(
                f"stage {self.stages[-1].kind} at epoch {epochs[-1]} leaves no epoch for repair in a run of "
                f"{max_epochs} epochs (0 to {max_epochs - 1}); raise --trainer.max_epochs"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LitClassifier) -> None:
        """In a resumed run whose network is already cut: takes up distillation where it was."""
        if pl_module.plans:
            self._teach(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LitClassifier) -> None:
        """Refuses a resumed run that is already past a stage which was never done; a failed frontier stays stopped.

        Raises:
            InputError: as said.
        """
        if self.failed:
            trainer.should_stop = True
            return
        late = [s for s in self.stages[len(self.records) :] if s.epoch < trainer.current_epoch]
        if late:
            raise InputError(
                f"stage {late[0].kind} at epoch {late[0].epoch} was not done, and the checkpoint is already at epoch "
                f"{trainer.current_epoch}; move the stage or resume from an earlier checkpoint"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LitClassifier) -> None:
        """Runs the stage that is due in this epoch, if any."""
        done = len(self.records)
        if done < len(self.stages) and self.stages[done].epoch == trainer.current_epoch:
            self._run(self.stages[done], trainer, pl_module)
        self._epoch_began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LitClassifier) -> None:
        """Ends a phase: accuracy after repair, and a checkpoint (`dense.ckpt`, then one named after each stage)."""
        pl_module.check_finite()
        if self.records:
            self.records[-1]["seconds"]["repair"] += time.perf_counter() - self._epoch_began
        if trainer.current_epoch + 1 not in (*pl_module.phase_boundaries, trainer.max_epochs):
            return
        if self.records:
            self.records[-1]["accuracy"]["after_repair"] = self._evaluate(trainer, pl_module).figure
            if trainer.is_global_zero:
                write_stages(Path(trainer.default_root_dir), self.records)
        trainer.save_checkpoint(self._checkpoint(trainer, len(self.records)))
        trainer.should_stop = trainer.should_stop or self.failed

    def on_fit_end(self, trainer: Trainer, pl_module: LitClassifier) -> None:
        """Hands over the compact model, unless the run was cut short."""
        self._teaching.end(pl_module)
        ended = self.failed or trainer.current_epoch >= trainer.max_epochs
        if ended and self.records and trainer.is_global_zero:
            terminal().print(self._hand_over(Path(trainer.default_root_dir), trainer, pl_module))
        trainer.strategy.barrier("compact")

    @property
    def failed(self) -> bool:
        """Whether the last finished repair ended below the tolerance."""
        if self.tolerance is None or not self.records:
            return False
        return self.records[-1]["accuracy"]["after_repair"] < self.dense["accuracy"] - self.tolerance

    def _checkpoint(self, trainer: Trainer, done: int) -> Path:
        name = f"{done}-{self.stages[done - 1].kind}" if done else "dense"
        return Path(trainer.default_root_dir) / "checkpoints" / f"{name}.ckpt"

    def _hand_over(self, run_dir: Path, trainer: Trainer, module: LitClassifier) -> Table:
        """Writes `compact/`; after a failed repair from the checkpoint of the last stage that held."""
        if (run_dir / "compact" / "report.json").exists():
            return result_table(run_dir)
        write_stages(run_dir, self.records)
        if not self.failed:
            return write_compact(run_dir, Network.of(module), self.dense, self.records)
        trainer.strategy.checkpoint_io.teardown()  # waits for checkpoints that are still being written
        held = len(self.records) - 1
        if not held:
            raise InputError(
                f"the first stage already failed its repair ({self.records[0]['accuracy']['after_repair']:.2%}, dense "
                f"{self.dense['accuracy']:.2%}, tolerance {self.tolerance}): nothing to hand over; remove less at once"
            )
        network = Network.from_checkpoint(
            self._checkpoint(trainer, held), module.image_shape, trust=(module.backbone_name,)
        )
        return write_compact(run_dir, network, self.dense, self.records[:held])

    def _run(self, stage: PruningStage, trainer: Trainer, module: LitClassifier) -> None:
        """One stage: figures before, plan, surgery, recalibration, fresh optimizer, teacher, record."""
        if not self.dense:
            self._meet_dense(trainer, module)
        before = self.records[-1]["accuracy"]["after_repair"] if self.records else self.dense["accuracy"]
        record = open_record(len(self.records), stage, self.dense, before, cost(module.backbone, module.example_input))
        record["protocol"] = self._protocol(stage, trainer.max_epochs)
        clock = time.perf_counter()
        plan = self._shared_plan(stage, trainer, module)
        record["seconds"]["plan"] = time.perf_counter() - clock
        self._teaching.end(module)
        old, example = module.backbone, module.example_input
        carry = (lambda tensors: _slice(tensors, old, plan, example)) if self.optimizer is None else None
        with rewired(trainer, carry):
            clock = time.perf_counter()
            batches = trainer.datamodule.calibration_dataloader()
            network, plan = cut(old, plan, stage, batches, example)
            module.adopt(network, plan)
            module.phase_start = trainer.current_epoch
            record["seconds"]["surgery"] = time.perf_counter() - clock
            record["accuracy"]["after_surgery"] = self._evaluate(trainer, module).figure
            clock = time.perf_counter()
            self._recalibrate(trainer, module.backbone)
            record["seconds"]["recalibration"] = time.perf_counter() - clock
            record["accuracy"]["after_recalibration"] = self._evaluate(trainer, module).figure
        self._teach(trainer, module)
        complete_record(record, plan, cost(module.backbone, module.example_input))
        self.records.append(record)
        if trainer.is_global_zero:
            terminal().print(describe_record(record))

    def _meet_dense(self, trainer: Trainer, module: LitClassifier) -> None:
        """Figures of the dense network, as it is and recalibrated; saves it as the teacher."""
        counted = cost(module.backbone, module.example_input)
        accuracy = self._evaluate(trainer, module).figure
        statistics = {name: value.clone() for name, value in module.backbone.named_buffers()}
        self._recalibrate(trainer, module.backbone)
        recalibrated = self._evaluate(trainer, module).figure
        for name, value in module.backbone.named_buffers():
            value.copy_(statistics[name])
        self.dense = {
            "accuracy": accuracy,
            "accuracy_recalibrated": recalibrated,
            "macs": counted.macs,
            "params": counted.params,
            "plans": len(module.plans),
        }
        if self._teaching.is_own and trainer.is_global_zero:
            Network.of(module).save(self._teaching.folder(trainer.default_root_dir))
        trainer.strategy.barrier("teacher")

    def _teach(self, trainer: Trainer, module: LitClassifier) -> None:
        self._teaching.begin(trainer.default_root_dir, module, since=self.dense["plans"])

    def _shared_plan(self, stage: PruningStage, trainer: Trainer, module: LitClassifier) -> Plan:
        """Plan made on rank 0, the same on every rank; an error of rank 0 is raised everywhere."""
        message: dict[str, Any] | None = None
        if trainer.is_global_zero:
            try:
                dense = self._dense_cost(stage, trainer, module)
                batches = trainer.datamodule.calibration_dataloader()
                plan = plan_stage(module.backbone, stage, batches, module.example_input, dense, self.probe_limit)
                message = {"plan": plan.to_dict()}
            except InputError as error:
                message = {"error": str(error)}
        message = trainer.strategy.broadcast(message)
        if "error" in message:
            raise InputError(message["error"])
        return Plan.from_dict(message["plan"])

    def _dense_cost(self, stage: PruningStage, trainer: Trainer, module: LitClassifier) -> DenseCost:
        """What budgets are shares of."""
        if stage.budget != "latency":
            return DenseCost(self.dense["macs"], self.dense["params"])
        teacher = self._teaching.network(trainer.default_root_dir, module)
        return DenseCost.of(teacher, module.example_input, with_latency=True)

    def _evaluate(self, trainer: Trainer, module: LitClassifier) -> Evaluation:
        """Accuracy on the validation split, sums reduced over ranks."""
        return evaluate(
            module.backbone,
            trainer.datamodule.val_dataloader(),
            lambda sums: trainer.strategy.reduce(sums.to(module.device), reduce_op="sum").cpu(),
        )

    def _recalibrate(self, trainer: Trainer, backbone: torch.nn.Module) -> None:
        if self.recalibration_batches:
            loader = trainer.datamodule.recalibration_dataloader()
            recalibrate_batchnorm(backbone, loader, self.recalibration_batches)

    def _protocol(self, stage: PruningStage, max_epochs: int) -> dict[str, Any]:
        """How the stage was carried out, for its record."""
        later = [other.epoch for other in self.stages if other.epoch > stage.epoch]
        return {
            "stage": plain(stage.to_dict()),
            "repair": self.repair.to_dict(),
            "optimizer": "continued" if self.optimizer is None else "fresh, made for the phase",
            "removal": "physical",
            "recalibration_batches": self.recalibration_batches,
            "probe_limit": self.probe_limit,
            "repair_epochs": (min(later) if later else max_epochs) - stage.epoch,
        }


def _slice(tensors: dict[str, Tensor], old: torch.nn.Module, plan: Plan, example: Tensor) -> dict[str, Tensor]:
    """Optimizer tensors under the module's names, cut as the backbone's parameters are."""
    prefix = "backbone."
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return {prefix + name: tensor for name, tensor in transfer_tensors(old, plan, example, inner).items()}
