"""The one figure that says how good the network is: the user's logged monitor, or the metric of the task."""

from collections.abc import Iterable

from lightning.pytorch import Trainer

from lit_prune.errors import InputError
from lit_prune.task import Task
from lit_prune.train.capture import step_for_evaluation
from lit_prune.train.evaluation import evaluate
from lit_prune.train.locate import network_at
from lit_prune.train.module_task import task_in
from lit_prune.train.rewire import mean_over_ranks, sum_over_ranks, validation_loader
from lit_prune.train.samples import Samples
from lit_prune.train.validation import run_validation

MODES = ("max", "min")


class Figures:
    """Measures one figure of the network in a running `fit`.

    Args:
        monitor: key that the module's validation logs, such as `val/miou` (with several validation loaders
            `val/miou/dataloader_idx_0`); None takes the metric of the task on the validation loader.
        mode: whether more or less of the monitor is better.
        task: where there is no monitor; None recognises it.

    Raises:
        InputError: an unknown mode.
    """

    def __init__(self, monitor: str | None = None, mode: str = "max", task: Task | str | None = None) -> None:
        if mode not in MODES:
            raise InputError(f"mode={mode!r} is unknown; use max or min")
        self.monitor, self._mode, self.task = monitor, mode, task
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
        """Refuses a monitor that a validation epoch did not log.

        Raises:
            InputError: as said; what was logged is named.
        """
        if self.monitor is not None and self.monitor not in trainer.callback_metrics:
            self._refuse(trainer.callback_metrics)

    def measure(self, trainer: Trainer, path: str) -> float:
        """The figure of the network as it stands, on every rank the same.

        Raises:
            InputError: the monitor is not logged, or there is nothing to measure on.
        """
        if self.monitor is None:
            return self._task_metric(trainer, path)
        logged = run_validation(trainer)
        if self.monitor not in logged:
            self._refuse(logged)
        return mean_over_ranks(trainer, logged[self.monitor])

    def _refuse(self, logged: Iterable[str]) -> None:
        known = ", ".join(sorted(map(str, logged))) or "nothing"
        raise InputError(f"monitor: {self.monitor!r} is not logged by a validation epoch, which logs {known}")

    def _task_metric(self, trainer: Trainer, path: str) -> float:
        if validation_loader(trainer) is None:
            raise InputError(
                "monitor: the run has no validation loader to measure the network on; give one to fit, or a monitor"
            )
        samples = Samples(
            trainer,
            path,
            lambda: validation_loader(trainer),
            step_for_evaluation(trainer.lightning_module),
            "validation loader",
        )
        if self._found is None:
            self._found = task_in(trainer, path, samples.first(), self.task)
        network = network_at(trainer.lightning_module, path)
        found = evaluate(network, samples, lambda sums: sum_over_ranks(trainer, sums), self._found)
        self.images = found.images
        return found.figure
