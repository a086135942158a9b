"""Which optimizer and schedule train a phase of somebody's LightningModule."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.utils import clip_grad_norm_

from lit_prune.errors import InputError
from lit_prune.train.phases import spanning
from lit_prune.train.schedule import configure

ANEW = "anew"


class PhaseOptimizer:
    """Wraps `configure_optimizers` of one module instance: what it gives depends on the phase.

    Args:
        optimizer: of the repair phases: a callable that makes one from the parameters; `anew`, the module's own
            `configure_optimizers` with a fresh state; or None, the module's own goes on.
        scheduler: of the repair phases, where `optimizer` is a callable.
        gradient_clip: largest gradient norm in the repair phases, where `optimizer` is a callable.

    Raises:
        InputError: a scheduler without an optimizer.
    """

    def __init__(self, optimizer: Any, scheduler: Any, gradient_clip: float | None) -> None:
        if scheduler is not None and not callable(optimizer):
            raise InputError("scheduler: it has no effect without StagedPruning(optimizer=...); give both, or neither")
        if isinstance(optimizer, str) and optimizer != ANEW:
            raise InputError(f"optimizer={optimizer!r} is unknown; give a callable, {ANEW}, or None")
        self.optimizer, self.scheduler, self.gradient_clip = optimizer, scheduler, gradient_clip

    @property
    def continues(self) -> bool:
        """Whether optimizers go on over a cut."""
        return self.optimizer is None

    @property
    def description(self) -> str:
        """For the record of a stage."""
        if self.continues:
            return "continued: momentum of kept channels, learning rates and schedules"
        return (
            "fresh, by configure_optimizers, for the phase" if self.optimizer == ANEW else "fresh, made for the phase"
        )

    def attach(self, trainer: Trainer, module: LightningModule, phase: Callable[[], tuple[bool, int | None]]) -> None:
        """Wraps the module's hook.

        Args:
            trainer: in `fit`.
            module: the module.
            phase: whether a stage has been done, and the epochs of the phase (None: not known).
        """
        own = module.configure_optimizers

        @functools.wraps(own)
        def configure_optimizers() -> Any:
            repairs, epochs = phase()
            with spanning(trainer, None if self.continues else epochs):
                if repairs and callable(self.optimizer):
                    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
                    return configure(self.optimizer, self.scheduler, parameters, lambda: trainer)
                found = own()
            self._check(found)
            return found

        module.__dict__["configure_optimizers"] = configure_optimizers

    def detach(self, module: LightningModule) -> None:
        """Takes the wrapper off again."""
        module.__dict__.pop("configure_optimizers", None)

    def _check(self, found: Any) -> None:
        """Refuses several optimizers where the repair is to have one of its own."""
        several = (
            found[0] if isinstance(found, tuple | list) and found and isinstance(found[0], list | tuple) else found
        )
        if callable(self.optimizer) and isinstance(several, list | tuple) and len(several) > 1:
            raise InputError(
                f"optimizer: configure_optimizers gives {len(several)} optimizers, the repair would have one; leave "
                "StagedPruning(optimizer=None), or set it to anew"
            )

    def clip(self, optimizer: torch.optim.Optimizer) -> None:
        """Limits the gradients of a repair step; the trainer's own clipping comes after it."""
        if callable(self.optimizer) and self.gradient_clip is not None:
            clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.gradient_clip)
