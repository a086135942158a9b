"""What trains the parameters of a phase, and a learning rate schedule that fits the phase it runs in."""

import math
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_prune.errors import InputError, first_line


class PhaseCosine(LRScheduler):
    """Linear warm-up, then a half cosine to zero, over the steps of the current phase.

    With s the step, S the steps of the phase and W = warmup·S: factor (s + 1) / (W + 1) while s < W, then
    `½·(1 + cos(π·(s - W) / (S - W)))`. `fit_schedule` sets `phase_steps` when the phase begins, so that the same
    configuration serves the dense training and every repair.

    Args:
        optimizer: its learning rates are scaled.
        warmup: share of the phase spent warming up, in [0, 1).
        last_epoch: step of the last update, -1 at the start.
    """

    interval = "step"

    def __init__(self, optimizer: Optimizer, warmup: float = 0.0, last_epoch: int = -1) -> None:
        self.warmup = warmup
        self.phase_steps = 1
        super().__init__(optimizer, last_epoch)

    def begin(self, phase_steps: int) -> None:
        """Sets the length of the phase in optimizer steps and the learning rate of its first step."""
        self.phase_steps = max(1, phase_steps)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def factor(self, step: int) -> float:
        """Share of the base learning rate at `step`."""
        warm = self.warmup * self.phase_steps
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1.0, self.phase_steps - warm))))

    def get_lr(self) -> list[float | Tensor]:
        """Learning rate of every parameter group at the current step."""
        return [base * self.factor(max(0, self.last_epoch)) for base in self.base_lrs]


def fit_schedule(scheduler: LRScheduler, trainer: Trainer) -> LRScheduler:
    """The schedule, fitted to the steps that the trainer has before it where it is a `PhaseCosine`.

    Raises:
        InputError: the number of steps is not known.
    """
    if isinstance(scheduler, PhaseCosine):
        steps = trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise InputError("PhaseCosine: the number of training steps is not known; set max_epochs, or max_steps")
        scheduler.begin(int(steps))
    return scheduler


def configure(
    optimizer: OptimizerCallable,
    scheduler: LRSchedulerCallable | None,
    parameters: list[nn.Parameter],
    trainer: Callable[[], Trainer],
) -> Any:
    """What `configure_optimizers` returns for an optimizer of `parameters` and its schedule, if any.

    Args:
        optimizer: makes the optimizer.
        scheduler: makes the schedule; a `PhaseCosine` is fitted to the steps that the trainer has before it.
        parameters: what is trained.
        trainer: gives the trainer, asked for only where there is a schedule.

    Raises:
        InputError: one of them refuses its settings, such as a negative learning rate.
    """
    try:
        made = optimizer(parameters)
        if scheduler is None:
            return made
        schedule = scheduler(made)
    except InputError:
        raise
    except Exception as error:  # each optimizer and schedule has its own exceptions for settings
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"optimizer or scheduler is refused ({problem}); change its settings") from error
    interval = getattr(schedule, "interval", "epoch")
    return {"optimizer": made, "lr_scheduler": {"scheduler": fit_schedule(schedule, trainer()), "interval": interval}}
