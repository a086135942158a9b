"""The phases of a run: the training before the first stage, and the repair after each."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lightning.pytorch import Trainer

from lit_prune.errors import InputError
from lit_prune.train.stages import Stage


def total_epochs(trainer: Trainer) -> int | None:
    """Epochs of the run, by `max_epochs` or as many as `max_steps` need; None where neither says so yet."""
    limits = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs)
    batches = trainer.num_training_batches
    if trainer.max_steps > 0 and batches and math.isfinite(batches):
        limits.append(math.ceil(trainer.max_steps / math.ceil(batches / trainer.accumulate_grad_batches)))
    return min(limits) if limits else None


def check_epochs(stages: Sequence[Stage], total: int | None) -> None:
    """Refuses stages whose epochs do not fit the run.

    Args:
        stages: in their order.
        total: epochs of the run; None where that is not known yet.

    Raises:
        InputError: epochs out of order, or no epoch left for repair.
    """
    epochs = [stage.epoch for stage in stages]
    if any(later <= earlier for earlier, later in zip(epochs, epochs[1:], strict=False)):
        raise InputError(f"stage epochs must increase, one stage an epoch, got {epochs}")
    if total is not None and epochs[-1] >= total:
        raise InputError(
            f"stage {stages[-1].name} at epoch {epochs[-1]} leaves no epoch for repair in a run of {total} epochs "
            f"(0 to {total - 1}); raise --trainer.max_epochs (or max_steps)"
        )


@dataclass
class Phases:
    """Where a run stands among its phases.

    Attributes:
        boundaries: epochs of the stages.
        start: epoch at which the present phase began.
    """

    boundaries: tuple[int, ...]
    start: int = 0

    def length(self, total: int) -> int:
        """Epochs of the present phase: up to the next stage or the end of the run."""
        ends = [epoch for epoch in self.boundaries if epoch > self.start]
        return (min(ends) if ends else total) - self.start

    def ends_after(self, epoch: int, total: int | None) -> bool:
        """Whether a phase ends with this epoch."""
        return epoch + 1 in (*self.boundaries, total)


@contextmanager
def spanning(trainer: Trainer, epochs: int | None) -> Iterator[None]:
    """Inside, `trainer.max_epochs` and what follows from it (`estimated_stepping_batches`) are those of one phase.

    So a schedule that the module's `configure_optimizers` makes for the run, such as OneCycleLR, fits the phase.
    """
    whole = trainer.fit_loop.max_epochs
    if epochs is not None:
        trainer.fit_loop.max_epochs = epochs
    try:
        yield
    finally:
        trainer.fit_loop.max_epochs = whole
