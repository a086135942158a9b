"""The one figure that says how good the network is: the user's logged monitor, or the metric of the task."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_prune.errors import InputError
from lit_prune.task import Task, find_task
from lit_prune.train.capture import step_for_evaluation
from lit_prune.train.evaluation import evaluate
from lit_prune.train.locate import network_at
from lit_prune.train.module_task import task_in
from lit_prune.train.rewire import mean_over_ranks, sum_over_ranks, validation_loader
from lit_prune.train.samples import Samples, calibration_samples, check_calibration
from lit_prune.train.validation import run_validation


class Figures:
    """Measures one figure of the network in a running `fit`.

    Args:
        monitor: key that the module's validation logs, such as `val/miou` (with several validation loaders
            `val/miou/dataloader_idx_0`); None takes the metric of the task on the validation loader, or where there is
            none on the calibration samples.
        mode: whether more or less of the monitor is better.
        task: where there is no monitor; None recognises it.
        calibration: as in `calibration_samples`.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: str = "max",
        task: Task | str | None = None,
        calibration: Iterable[Any] | int | None = None,
    ) -> None:
        self.monitor, self._mode, self.task = monitor, mode, None if task is None else find_task(task)
        check_calibration(calibration)
        self.calibration = calibration
        self._found: Task | None = None
        self.images: int | None = None  # of the last measurement, where it is known

    @property
    def name(self) -> str:
        """Name of the figure: the monitor, or the task's metric."""
        return self.monitor or (self._found.metric_name if self._found else "metric")

    @property
    def mode(self) -> str:
        """`max` or `min`: which way is better."""
        if self.monitor or self._found is None:
            return self._mode
        return "max" if self._found.higher_is_better else "min"

    def loss_of(self, reference: float, value: float) -> float:
        """How much worse `value` is than `reference`, in units of the figure."""
        return reference - value if self.mode == "max" else value - reference

    def check_logged(self, trainer: Trainer) -> None:
        """Refuses a monitor that a validation epoch did not log. InputError: as said; what was logged is named."""
        if self.monitor is not None and self.monitor not in trainer.callback_metrics:
            self._refuse(trainer.callback_metrics)

    def check(self, trainer: Trainer, path: str) -> None:
        """Refuses, before training, a run in which nothing could be measured.

        Raises:
            InputError: a monitor without a validation loop, or neither a monitor nor a task with a figure.
        """
        if self.monitor is not None:
            if step_for_evaluation(trainer.lightning_module) == "training_step" or validation_loader(trainer) is None:
                self._refuse(())
            return
        samples = self._samples(trainer, path)
        task, some = self._task(trainer, path, samples), samples.first()
        if validation_loader(trainer) is None:
            rank_zero_warn(f"there is no validation loader: {task.metric_name} is measured on {samples.origin}")
        try:
            evaluate(network_at(trainer.lightning_module, path), [some], None, task)
        except InputError as error:
            raise InputError(
                f"monitor: none is given, and the network alone has no figure ({error}); give monitor=, or "
                "task='unlabelled' for the mean square of its output"
            ) from error

    def measure(self, trainer: Trainer, path: str) -> float:
        """The figure of the network as it stands, on every rank the same.

        Raises:
            InputError: the monitor is not logged, or there is nothing to measure on.
        """
        if self.monitor is None:
            return self._task_metric(trainer, path)
        logged = run_validation(trainer, path)
        if self.monitor not in logged:
            self._refuse(logged)
        return mean_over_ranks(trainer, logged[self.monitor])

    def _refuse(self, logged: Iterable[str]) -> None:
        known = ", ".join(sorted(map(str, logged))) or "nothing"
        raise InputError(f"monitor: {self.monitor!r} is not logged by a validation epoch, which logs {known}")

    def _task_metric(self, trainer: Trainer, path: str) -> float:
        samples = self._samples(trainer, path)
        task = self._task(trainer, path, samples)
        network = network_at(trainer.lightning_module, path)
        found = evaluate(network, samples, lambda sums: sum_over_ranks(trainer, sums), task)
        self.images = found.images
        return found.figure

    def _samples(self, trainer: Trainer, path: str) -> Samples:
        if validation_loader(trainer) is None:
            return calibration_samples(trainer, path, self.calibration)
        step = step_for_evaluation(trainer.lightning_module)
        return Samples(trainer, path, lambda: validation_loader(trainer), step, "validation loader")

    def _task(self, trainer: Trainer, path: str, samples: Samples) -> Task:
        if self._found is None:
            self._found = task_in(trainer, path, samples.first(), self.task)
        return self._found
