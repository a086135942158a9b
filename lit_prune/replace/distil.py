"""Short repair without labels: gradient steps towards the original's prediction make up for what refit has left."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.replace.errors import Spread
from lit_prune.running import undisturbed
from lit_prune.task import Task

Augment = Callable[[Any, torch.Generator], Any]
CHECKS = 10  # how often the held-out distortion is looked at


@checked
@dataclass(frozen=True)
class Distilling:
    """Settings of `distil`; give `seconds` or `epochs`. The learning rate falls to 0 over them (cosine).

    Attributes:
        seconds: how long it may take.
        epochs: passes over the samples that are not held out; parts of one count.
        learning_rate: of Adam, at the start.
        batch: samples in a step.
        held_out: share of the batches, the last ones, by whose distortion the result is chosen.
        decay: of the running average of the weights, for each step.
        seed: of the order.
    """

    seconds: float | None = None
    epochs: float | None = None
    learning_rate: float = 3e-4
    batch: int = 64
    held_out: float = 0.2
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

    The loss is the squared change of the prediction over its variance. Both networks stay in evaluation mode: norms
    keep their statistics, only weights and biases move. What is kept is the running average of the weights with the
    least distortion on held-out samples, the start included: it never ends worse there than it began.

    Args:
        original: the network before surgery.
        reduced: the one after; floating-point parameters that do not require a gradient stay as they are.
        batches: what the task reads; targets are not used.
        task: runs the networks and says what the prediction is.
        settings: time, rates.
        augment: moves the samples of a batch as training does, at random by the generator; None: as they are.

    Returns:
        `steps`, `distortion_before`, `distortion_after` (held out).

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
    """The state of one repair: optimizer, averaged weights, the best so far."""

    def __init__(
        self, original: nn.Module, reduced: nn.Module, task: Task, settings: Distilling, held_out: Sequence[Any]
    ) -> None:
        self.original, self.reduced, self.task, self.settings, self.held_out = (
            original,
            reduced,
            task,
            settings,
            held_out,
        )
        self.parameters = [p for p in reduced.parameters() if p.requires_grad and p.is_floating_point()]
        self.optimizer = torch.optim.Adam(self.parameters, settings.learning_rate)
        self.average = copy.deepcopy([p.detach() for p in self.parameters])
        self.best, self.checks, self.steps = copy.deepcopy(self.average), 0, 0
        self.wanted, spread = self._predictions(original), Spread()
        for values in self.wanted:
            spread.add(values)
        self.scale = 1 / max(spread.variance(), torch.finfo(torch.float32).tiny)
        self.before = self.least = self._distortion()
        self.generator = torch.Generator().manual_seed(settings.seed)

    def step(self, piece: Any, progress: float) -> None:
        """One step; now and then a look at the held-out samples."""
        if progress * CHECKS >= self.checks + 1:
            self.check()
        self.steps += 1
        batch = self.task.to(piece, self.reduced)
        with torch.no_grad():
            wanted = self._predict(self.original, batch)
        loss = self.scale * (self._predict(self.reduced, batch) - wanted).square().sum(1).mean()
        self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate * (1 + math.cos(math.pi * progress)) / 2
        gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        for mean, parameter in zip(self.average, self.parameters, strict=True):
            mean.lerp_(parameter.detach(), 1 - self.settings.decay)

    def check(self) -> None:
        """Looks at the averaged weights; the present ones stay in training."""
        self.checks += 1
        present = [p.detach().clone() for p in self.parameters]
        self._write(self.average)
        found = self._distortion()
        if found < self.least:
            self.least, self.best = found, [mean.clone() for mean in self.average]
        self._write(present)

    def finish(self) -> dict[str, float]:
        """Leaves the best weights in the network."""
        self._write(self.best)
        for parameter in self.parameters:
            parameter.grad = None
        return {"distortion_before": self.before, "distortion_after": self.least}

    def _write(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)

    def _predict(self, model: nn.Module, batch: Any) -> Tensor:
        """[B, D]."""
        values = self.task.compared(self.task.run(model, batch))
        return values.reshape(len(values), -1)

    def _predictions(self, model: nn.Module) -> list[Tensor]:
        """Of the held-out samples, float64, batch by batch."""
        with torch.no_grad():
            batches = (self.task.to(batch, self.reduced) for batch in self.held_out)
            return [self._predict(model, batch).double() for batch in batches]

    def _distortion(self) -> float:
        """Mean squared change of the held-out prediction, scaled."""
        pairs = zip(self.wanted, self._predictions(self.reduced), strict=True)
        squared = sum(float((wanted - found).square().sum()) for wanted, found in pairs)
        return self.scale * squared / sum(map(len, self.wanted))
