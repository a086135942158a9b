"""Short repair without labels: gradient steps towards the original's prediction make up for what refit has left."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.replace.together import step_units
from lit_prune.running import undisturbed
from lit_prune.task import Task

Augment = Callable[[Any, torch.Generator], Any]
CHECKS = 10  # how often the held-out divergence is looked at
GROWING = 0.2  # share of the time in which the steps grow from 0


@checked
@dataclass(frozen=True)
class Distilling:
    """Settings of `distil`; give `seconds` or `epochs`. The learning rate grows from 0 and falls to 0 over them.

    Attributes:
        seconds: how long it may take.
        epochs: passes over the samples that are not held out; parts of one count.
        learning_rate: of Adam, in units of what a layer gives: a step of 1 changes its output by its spread
            (`together.step_units`).
        batch: samples in a step.
        held_out: share of the batches, the last ones, by whose divergence the result is chosen.
        decay: of the running average of the weights, for each step.
        seed: of the order.
    """

    seconds: float | None = None
    epochs: float | None = None
    learning_rate: float = 3e-3
    batch: int = 32
    held_out: float = 0.1
    decay: float = 0.98
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values. InputError: one is outside its range."""
        if (self.seconds is None) == (self.epochs is None):
            raise InputError(f"seconds={self.seconds}, epochs={self.epochs}: give one of them")
        if (self.seconds or self.epochs or 0) <= 0 or self.learning_rate <= 0 or self.batch < 1:
            raise InputError(
                f"seconds={self.seconds}, epochs={self.epochs}, learning_rate={self.learning_rate} and "
                f"batch={self.batch} must be above 0"
            )
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out={self.held_out} must lie within (0, 1)")


def distil(
    original: nn.Module,
    reduced: nn.Module,
    batches: Sequence[Any],
    task: Task,
    settings: Distilling,
    augment: Augment | None = None,
) -> dict[str, Any]:
    """Trains `reduced` in place towards the original's prediction, and leaves it at the best that was seen.

    The loss is the task's divergence of the two predictions (`Task.divergence`: the squared change; of segmentation
    KL). Both networks stay in evaluation mode: norms keep their statistics, only weights and biases move. What is kept
    is the running average of the weights with the least divergence on held-out samples, the start included: it never
    ends worse there than it began.

    Args:
        original: the network before surgery.
        reduced: the one after; floating-point parameters that do not require a gradient stay as they are.
        batches: what the task reads; targets are not used.
        task: runs the networks and says what the prediction is.
        settings: time, rates.
        augment: moves the samples of a batch as training does, at random by the generator; None: as they are.

    Returns:
        `steps`, `divergence_before`, `divergence_after` (mean over held-out samples).

    Raises:
        InputError: a single batch, of which nothing can be held out; no parameter that may move.
    """
    if not any(p.requires_grad for p in reduced.parameters()):
        raise InputError("the network's parameters are all frozen, so that nothing can be repaired; set requires_grad")
    count = max(1, round(settings.held_out * len(batches)))
    if count == len(batches):
        raise InputError("batches: a single one, but some are trained on and others held out; give smaller batches")
    fitted, held_out = batches[:-count], batches[-count:]
    with undisturbed(original, gradients=True), undisturbed(reduced, gradients=True):
        race = _Race(original, reduced, task, settings, held_out)
        for piece, progress in _pieces(fitted, task, settings, race.generator):
            race.step(piece if augment is None else augment(piece, race.generator), progress)
        race.check()
        return {"steps": race.steps, **race.finish()}


def _pieces(
    batches: Sequence[Any], task: Task, settings: Distilling, generator: torch.Generator
) -> Iterator[tuple[Any, float]]:
    """Parts of batches in a new order in each epoch, and how much of the time or of the epochs is over."""
    places = [
        (index, start) for index, batch in enumerate(batches) for start in range(0, task.size(batch), settings.batch)
    ]
    steps = math.ceil((settings.epochs or 0) * len(places))
    began, step = time.perf_counter(), 0
    while True:
        for place in torch.randperm(len(places), generator=generator).tolist():
            progress = (time.perf_counter() - began) / settings.seconds if settings.seconds else step / steps
            if progress >= 1:
                return
            index, start = places[place]
            yield task.take(batches[index], slice(start, start + settings.batch)), progress
            step += 1


class _Race:
    """The state of one repair, in moves: a parameter is where it began plus its unit of a step times its move."""

    def __init__(
        self, original: nn.Module, reduced: nn.Module, task: Task, settings: Distilling, held_out: Sequence[Any]
    ) -> None:
        self.original, self.reduced, self.task, self.settings = original, reduced, task, settings
        self.held_out = held_out
        moving = {name: p for name, p in reduced.named_parameters() if p.requires_grad and p.is_floating_point()}
        self.parameters = list(moving.values())
        few = task.take(held_out[0], settings.batch)
        units = step_units(reduced, lambda: task.run(reduced, task.to(few, reduced)))
        self.units = [units[name] for name in moving]
        self.start = [p.detach().clone() for p in self.parameters]
        self.moves = [torch.zeros_like(p) for p in self.start]
        self.average, self.best = ([torch.zeros_like(p) for p in self.start] for _ in range(2))
        self.optimizer = torch.optim.Adam(self.moves, settings.learning_rate, eps=1e-12)
        self.checks, self.steps = 0, 0
        with torch.no_grad():
            self.wanted = [self._answers(original, batch) for batch in held_out]
        self.before = self.least = self._divergence()
        self.generator = torch.Generator().manual_seed(settings.seed)

    def step(self, piece: Any, progress: float) -> None:
        """One step; now and then a look at the held-out samples."""
        if progress * CHECKS >= self.checks + 1:
            self.check()
        self.steps += 1
        with torch.no_grad():
            wanted = self._answers(self.original, piece)
        loss = self.task.divergence(wanted, self._answers(self.reduced, piece)).mean()
        gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        for move, unit, gradient in zip(self.moves, self.units, gradients, strict=True):
            move.grad = gradient * unit
        share = min(1.0, progress / GROWING) * (1 + math.cos(math.pi * progress)) / 2
        self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate * share
        self.optimizer.step()
        for mean, move in zip(self.average, self.moves, strict=True):
            mean.lerp_(move, 1 - self.settings.decay)
        self._write(self.moves)

    def check(self) -> None:
        """Looks at the averaged weights; the present ones stay in training."""
        self.checks += 1
        self._write(self.average)
        found = self._divergence()
        if found < self.least:
            self.least, self.best = found, [mean.clone() for mean in self.average]
        self._write(self.moves)

    def finish(self) -> dict[str, float]:
        """Leaves the best weights in the network."""
        self._write(self.best)
        return {"divergence_before": self.before, "divergence_after": self.least}

    def _write(self, moves: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, start, unit, move in zip(self.parameters, self.start, self.units, moves, strict=True):
                parameter.copy_(start + unit * move)

    def _answers(self, model: nn.Module, batch: Any) -> Tensor:
        """What the networks are compared by, [B, ...]."""
        return self.task.compared(self.task.run(model, self.task.to(batch, model)))

    def _divergence(self) -> float:
        """Mean over the held-out samples."""
        with torch.no_grad():
            pairs = zip(self.wanted, self.held_out, strict=True)
            found = [self.task.divergence(wanted, self._answers(self.reduced, batch)) for wanted, batch in pairs]
        return float(torch.cat(found).double().mean())
