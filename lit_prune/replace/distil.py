"""Short repair without labels: gradient steps towards the original's prediction make up for what refit has left."""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.task import Task
from lit_prune.task.running import undisturbed

CHECKS = 10  # how often the held-out distortion is looked at


@dataclass(frozen=True)
class Distilling:
    """Settings of `distil`.

    Attributes:
        seconds: how long it may take; the learning rate falls to 0 over it (cosine).
        learning_rate: of Adam, at the start.
        batch: samples in a step.
        held_out: share of the batches, the last ones, by whose distortion the result is chosen.
        decay: of the running average of the weights, for each step.
        seed: of the order.
    """

    seconds: float
    learning_rate: float = 3e-4
    batch: int = 64
    held_out: float = 0.2
    decay: float = 0.98
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: one is outside its range.
        """
        if self.seconds <= 0 or self.learning_rate <= 0 or self.batch < 1 or not 0 < self.held_out < 1:
            raise InputError(
                f"seconds={self.seconds}, learning_rate={self.learning_rate} and batch={self.batch} must be above 0, "
                f"held_out={self.held_out} within (0, 1)"
            )


def distil(
    original: nn.Module, reduced: nn.Module, batches: Sequence[Any], task: Task, settings: Distilling
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
    start = time.perf_counter()
    with undisturbed(original, gradients=True), undisturbed(reduced, gradients=True):
        race = _Race(original, reduced, task, settings, held_out)
        steps = 0
        while (elapsed := time.perf_counter() - start) < settings.seconds:
            race.step(fitted, elapsed / settings.seconds)
            steps += 1
        race.check()
        return {"steps": steps, **race.finish()}


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
        self.best, self.checks = copy.deepcopy(self.average), 0
        self.scale = 1.0
        self.scale = 1 / max(self._distortion(None), torch.finfo(torch.float32).tiny)  # the prediction's own variance
        self.before = self.least = self._distortion(self.reduced)
        self.generator = torch.Generator().manual_seed(settings.seed)

    def step(self, batches: Sequence[Any], progress: float) -> None:
        """One step on samples of one batch; now and then a look at the held-out ones."""
        if progress * CHECKS >= self.checks + 1:
            self.check()
        whole = batches[int(torch.randint(len(batches), (), generator=self.generator))]
        size, part = self.task.size(whole), self.settings.batch
        first = int(torch.randint(max(1, size - part + 1), (), generator=self.generator))
        batch = self.task.to(self.task.take(whole, slice(first, first + part)), self.reduced)
        with torch.no_grad():
            wanted = self._predict(self.original, batch)
        loss = self.scale * (self._predict(self.reduced, batch) - wanted).square().flatten(1).sum(1).mean()
        self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate * (1 + math.cos(math.pi * progress)) / 2
        for parameter, gradient in zip(self.parameters, torch.autograd.grad(loss, self.parameters), strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        for mean, parameter in zip(self.average, self.parameters, strict=True):
            mean.lerp_(parameter.detach(), 1 - self.settings.decay)

    def check(self) -> None:
        """Looks at the averaged weights; the present ones stay in training."""
        self.checks += 1
        present = [p.detach().clone() for p in self.parameters]
        self._write(self.average)
        found = self._distortion(self.reduced)
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
        return self.task.prediction(self.task.run(model, batch))

    def _distortion(self, model: nn.Module | None) -> float:
        """Mean squared change of the held-out prediction, scaled; without a model its variance."""
        pairs = []
        with torch.no_grad():
            for batch in self.held_out:
                batch = self.task.to(batch, self.reduced)
                wanted = self._predict(self.original, batch).double().flatten(1)
                pairs.append((wanted, None if model is None else self._predict(model, batch).double().flatten(1)))
        wanted = torch.cat([pair[0] for pair in pairs])
        other = wanted.mean(0) if model is None else torch.cat([pair[1] for pair in pairs])
        return self.scale * float((wanted - other).square().sum(1).mean())
