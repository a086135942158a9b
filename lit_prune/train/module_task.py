"""The task of a LightningModule: its batches as its network gets them, its loss as its own step computes it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lit_prune.errors import InputError, first_line
from lit_prune.running import undisturbed
from lit_prune.structure.example import Example
from lit_prune.task import TASKS, Task, find_task
from lit_prune.task.batches import describe, find_layout, map_tensors
from lit_prune.task.recognise import telling
from lit_prune.train.capture import Seen, as_found, step_arguments
from lit_prune.train.locate import network_at

GIVE = "give task=, such as Custom of lit_prune.task, with a loss"


class _OnSeen(Task):
    """A task on batches as the network gets them (`Seen`)."""

    def inputs(self, batch: Seen) -> Example:
        """What the network was called with."""
        return Example(batch.args, batch.kwargs)

    def to(self, batch: Seen, model: nn.Module) -> Seen:
        """On the network's device; they are there already where the module's hooks put them there."""
        device = next(model.parameters()).device
        parts = (batch.args, batch.kwargs, batch.batch)
        return Seen(*(map_tensors(part, lambda tensor: tensor.to(device)) for part in parts))

    def take(self, batch: Seen, samples: slice | int) -> Seen:
        """Some of the samples."""
        return batch.take(slice(samples) if isinstance(samples, int) else samples)

    def size(self, batch: Seen) -> int:
        """Number of samples."""
        return batch.size


class SeenTask(_OnSeen):
    """The network reads the arguments of its call, the inner task the module's batch."""

    def __init__(self, inner: Task) -> None:
        self.inner = inner
        self.name, self.needs_target, self.scalar_loss = inner.name, inner.needs_target, inner.scalar_loss
        self.metric_name, self.higher_is_better = inner.metric_name, inner.higher_is_better
        self.decides = inner.decides

    def inputs(self, batch: Seen) -> Example:
        """What of the network's call it answers to."""
        return self.inner.asked(super().inputs(batch))

    def run(self, model: nn.Module, batch: Seen) -> Any:
        """The network's output."""
        return self.inner.respond(model, super().inputs(batch), batch.batch)

    def relabelled(self, batch: Seen, target: Any) -> Seen:
        """The module's batch with another target, and the same call."""
        return replace(batch, batch=self.inner.relabelled(batch.batch, target))

    @property
    def variables(self) -> tuple[str, ...]:
        """The inner task's."""
        return self.inner.variables


def _asking(name: str) -> Callable[..., Any]:
    """A method of `SeenTask` that asks the inner task, which is shown the module's batches."""

    def ask(self: SeenTask, *given: Any) -> Any:
        return getattr(self.inner, name)(*(part.batch if isinstance(part, Seen) else part for part in given))

    return ask


OF_BATCHES = ("target", "loss", "metric", "default_variable", "variable", "kinds", "curvature_terms")
OF_OUTPUTS = ("prediction", "paired", "compared", "figure", "agreement", "divergence")
for _name in (*OF_BATCHES, *OF_OUTPUTS):
    setattr(SeenTask, _name, _asking(_name))


class ModuleTask(_OnSeen):
    """The loss is what the module's own `training_step` returns for an output of the network.

    Where the step cannot be asked (manual optimization, several calls of the network, samples that it does not take one
    by one), there is no task variable, and what needs a loss says why.

    Attributes:
        refusal: why the step gives no loss for a sample; "" where it does.

    Args:
        trainer: in `fit`.
        path: of the network in `trainer.lightning_module`.
        seen: a batch, to find out.
    """

    name = "module"
    scalar_loss = True

    def __init__(self, trainer: Trainer, path: str, seen: Seen) -> None:
        self.trainer, self.path = trainer, path
        self.refusal = self._tried(seen.first(1))

    def _tried(self, one: Seen) -> str:
        """Why the step gives no loss for one sample, or ""."""
        network = network_at(self.trainer.lightning_module, self.path)
        try:
            with undisturbed(network):
                self.loss(self.run(network, one), one)
        except InputError as error:
            return str(error)
        return ""

    def default_variable(self, batch: Seen) -> str | None:
        """The loss, where there is one."""
        return None if self.refusal else "negative_loss"

    def target(self, batch: Seen) -> Any:
        """The whole batch: what the step reads in it is not known."""
        return batch.batch

    def loss(self, output: Any, batch: Seen) -> Tensor:
        """The mean loss of the batch, a scalar.

        Raises:
            InputError: the step does not take the samples, calls the network several times, or returns None or
                something without a loss; manual optimization.
        """
        module = self.trainer.lightning_module
        returned = self._returned(module, output, batch)
        loss = returned.get("loss") if isinstance(returned, dict) else returned
        if not isinstance(loss, Tensor):
            raise InputError(
                f"task: training_step of {type(module).__name__} returns {type(returned).__name__}, not a loss; give "
                "task= with a loss, or a score that needs none"
            )
        return loss

    def _returned(self, module: LightningModule, output: Any, batch: Seen) -> Any:
        """What the module's own step returns where its network answers `output`."""
        network, kind = network_at(module, self.path), type(module).__name__
        step = getattr(module.training_step, "__wrapped__", module.training_step)
        if not module.automatic_optimization:
            raise InputError(f"task: {kind} optimizes manually, so that its step cannot be asked for a loss; {GIVE}")
        with (
            as_found(self.trainer, module, network),
            isolate_rng(),
            _answering(network, output) as calls,
            torch.enable_grad(),
        ):
            torch.manual_seed(0)
            try:
                returned = step(*step_arguments(step, batch.batch, 0, 0))
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
                reason = first_line(error)
                raise InputError(
                    f"task: training_step of {kind} does not run on {batch.size} samples of a batch, "
                    f"{describe(batch.batch)} ({reason}); {GIVE}"
                ) from error
        if len(calls) > 1:
            raise InputError(
                f"task: training_step of {kind} calls the network {len(calls)} times, so that its loss is none of one "
                f"output; {GIVE} and a run that makes these calls"
            )
        return returned


@contextmanager
def _answering(network: nn.Module, output: Any) -> Iterator[list[None]]:
    """The network answers `output` to everything, and does not run; one entry is added at each call."""
    calls: list[None] = []

    def respond(*_: Any, **__: Any) -> Any:
        calls.append(None)
        return output

    answers = dict.fromkeys(("forward", "_call_impl"), respond)  # hooks that watch the network do not run either
    before = {key: value for key, value in network.__dict__.items() if key in answers}
    network.__dict__.update(answers)
    try:
        yield calls
    finally:
        for key in answers:
            del network.__dict__[key]
        network.__dict__.update(before)


def task_in(trainer: Trainer, path: str, seen: Seen, given: Task | str | None) -> Task:
    """The task of a module's network.

    Args:
        trainer: in `fit`.
        path: of the network.
        seen: a batch.
        given: a task on the module's batches, or its name; None recognises it from what the network answers, and falls
            back on the module's own loss.
    """
    if given is not None:
        return SeenTask(find_task(given))
    found = _recognised(network_at(trainer.lightning_module, path), seen)
    return ModuleTask(trainer, path, seen) if found is None else SeenTask(found)


def _recognised(network: nn.Module, seen: Seen) -> Task | None:
    """The task of `TASKS` that fits the network's answer and the target of the batch, or None."""
    few = seen.first(2)
    try:
        target = telling(*(find_layout(part.batch).target_of(part.batch) for part in (seen, few)))
    except InputError:
        return None
    with undisturbed(network):
        output = network(*few.args, **few.kwargs)
    fitting = (kind() for kind in TASKS.latest_first() if kind.fits(output, target, few.size))
    return next(fitting, None) if target is not None else None
