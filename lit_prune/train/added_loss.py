"""Terms that callbacks add to the loss of a LightningModule, from outside: its `training_step` is wrapped."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_prune.arguments import checked
from lit_prune.errors import InputError


class AddedTerm(Protocol):
    """A scalar to be added to the loss of a step."""

    def __call__(self) -> Tensor | None:
        """Its value for the step that has just run; None where it adds nothing."""
        ...

    def forget(self) -> None:
        """A new step begins: drops what was kept of one that took no term."""
        ...


class AddedLoss:
    """The terms added to one module's loss, their sums over the epoch, and how often they were evaluated.

    Attributes:
        terms: name -> term, evaluated after each `training_step`.
        sums: name -> sum of the values since `begin_epoch`.
        steps: training steps since then.
        evaluations: name -> how often the term gave a value since then.
    """

    def __init__(self) -> None:
        self.terms: dict[str, AddedTerm] = {}
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Forgets the sums of the epoch before."""
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.evaluations: dict[str, int] = {}

    def begin_step(self) -> None:
        """Counts a step."""
        self.steps += 1
        for term in self.terms.values():
            term.forget()

    def total(self) -> Tensor | None:
        """Sum of the terms for the step that has just run; None where none adds anything."""
        found = None
        for name, term in self.terms.items():
            value = term()
            if value is None:
                continue
            self.evaluations[name] = self.evaluations.get(name, 0) + 1
            self.sums[name] = self.sums.get(name, 0) + value.detach()
            found = value if found is None else found + value
        return found

    def mean(self, name: str) -> Tensor | None:
        """Mean of a term over the steps of the epoch so far, 0 where it added nothing; None where it never did.

        Raises:
            InputError: it is NaN or infinite.
        """
        if name not in self.sums:
            return None
        mean = self.sums[name] / max(1, self.steps)
        if not torch.isfinite(mean):
            raise InputError(f"the term {name} of the loss is NaN or infinite; lower its weight or the learning rate")
        return mean


def add_term(module: LightningModule, name: str, term: AddedTerm) -> AddedLoss:
    """Adds a term to the loss that `module.training_step` returns (a tensor, or a dict with `loss`).

    In manual optimization nothing is returned: there the module's own loss takes `added_loss(self)`.
    """
    step = module.training_step
    added = getattr(step, "added_loss", None)
    if added is None:
        added = AddedLoss()
        module.__dict__["training_step"] = _wrapped(module, step, added)
    added.terms[name] = term
    return added


def drop_term(module: LightningModule, name: str) -> None:
    """Takes a term out again; with the last one goes the wrapper."""
    added = getattr(module.training_step, "added_loss", None)
    if added is not None:
        added.terms.pop(name, None)
        if not added.terms:
            module.__dict__.pop("training_step", None)


@checked
def added_loss(module: LightningModule) -> Tensor:
    """What callbacks add to the loss of this step: for the loss of a module with manual optimization.

    Call it in `training_step` after the network: `loss = own_loss + lit_prune.added_loss(self)`. It is 0 where nothing
    is to be added, so the line may stay in modules that are trained without callbacks.
    """
    added = getattr(module.training_step, "added_loss", None)
    total = None if added is None else added.total()
    return torch.zeros((), device=module.device) if total is None else total


def _wrapped(module: LightningModule, step: Callable[..., Any], added: AddedLoss) -> Callable[..., Any]:
    @functools.wraps(step)
    def with_terms(*args: Any, **kwargs: Any) -> Any:
        if not _trains(module):
            return step(*args, **kwargs)
        added.begin_step()
        output = step(*args, **kwargs)
        return _plus(output, added, module) if module.automatic_optimization else output

    vars(with_terms)["added_loss"] = added
    return with_terms


def _trains(module: LightningModule) -> bool:
    """Whether a step is one of training: validation may call `training_step` too, for its loss alone."""
    trainer = getattr(module, "_trainer", None)
    return torch.is_grad_enabled() and (trainer is None or trainer.training)


def _plus(returned: Any, added: AddedLoss, module: LightningModule) -> Any:
    """What the step returned, with the terms in its loss; None (a skipped step) stays None."""
    if returned is None:
        return None
    total = added.total()
    if total is None:
        return returned
    if isinstance(returned, Tensor):
        return returned + total
    if isinstance(returned, Mapping) and isinstance(returned.get("loss"), Tensor):
        return {**returned, "loss": returned["loss"] + total}
    raise InputError(
        f"training_step of {type(module).__name__} returns {type(returned).__name__}, to which no term can be added; "
        "return the loss, or a dict with the key loss"
    )
