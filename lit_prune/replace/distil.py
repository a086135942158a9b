"""Short repair without labels: gradient steps towards the original's prediction make up for what refit has left."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.replace.spread import Spread
from lit_prune.replace.stage_maps import find_stages, hearing
from lit_prune.replace.step_units import step_units
from lit_prune.running import undisturbed
from lit_prune.task import Task

Augment = Callable[[Any, torch.Generator], Any]
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the way that may be gone, beside none of it
WARM_UP = 0.2  # share of the repair over which the step grows
STAGES = 0.3  # weight of each stage's loss beside that of the prediction
KEPT = 1 << 26  # values that the original gives, prediction and stages, kept for the next epoch


@checked
@dataclass(frozen=True)
class Distilling:
    """Settings of `distil`; give `seconds` or `epochs`.

    Attributes:
        seconds: how long it may take, judging included; a single step is not broken off.
        epochs: passes over the samples that are not held out; parts of one count.
        step: of a parameter at most, in units of `step_units`. Grows from 0 over the first fifth, then falls to 0
            (half a cosine).
        batch: samples in a step.
        held_out: share of the batches, the last ones, that say how much of the way is gone.
        seed: of the order.
    """

    seconds: float | None = None
    epochs: float | None = None
    step: float = 3e-3
    batch: int = 64
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: one is outside its range.
        """
        if (self.seconds is None) == (self.epochs is None):
            raise InputError(f"seconds={self.seconds}, epochs={self.epochs}: give one of them")
        if (self.seconds or self.epochs or 0) <= 0 or self.step <= 0 or self.batch < 1:
            raise InputError(
                f"seconds={self.seconds}, epochs={self.epochs}, step={self.step} and batch={self.batch} must be above 0"
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
    """Trains `reduced` in place towards the original's prediction, as far as held-out samples are served by it.

    The loss is the distortion of the prediction, `E‖p - p*‖² / E‖p* - E p*‖²` (p the prediction, p* the original's),
    and 0.3 times the same of what each stage gives (`find_stages`), through the linear map of its channels that is
    nearest before the first step. Adam moves each parameter in units of `step_units`, so that rescaling a unit and
    undoing it behind changes nothing. Both networks stay in evaluation mode: norms keep their statistics, only weights
    and biases move. Of the way that was found the share in {1, 3/4, 1/2, 1/4, 0} is gone that has the least distortion
    of the prediction on held-out samples: it never ends worse there than it began.

    Args:
        original: the network before surgery.
        reduced: the one after; floating-point parameters that do not require a gradient stay as they are.
        batches: what the task reads; targets are not used.
        task: runs the networks and says what the prediction is.
        settings: time, step.
        augment: moves the samples of a batch as training does, at random by the generator; None: as they are.

    Returns:
        `steps`, `share` of the way, `distortion_before` and `distortion_after` (held out).

    Raises:
        InputError: a single batch, of which nothing can be held out; no parameter that may move.
    """
    began = time.perf_counter()
    if not any(p.requires_grad for p in reduced.parameters()):
        raise InputError("the network's parameters are all frozen, so that nothing can be repaired; set requires_grad")
    count = max(1, round(settings.held_out * len(batches)))
    if count == len(batches):
        raise InputError("batches: a single one, but some are trained on and others held out; give smaller batches")
    fitted, held_out = batches[:-count], batches[-count:]
    generator = torch.Generator().manual_seed(settings.seed)
    with ExitStack() as inside:
        for model in (original, reduced):
            inside.enter_context(undisturbed(model, gradients=True))
        judge = _Judge(original, reduced, task, held_out)
        descent = _Descent(original, reduced, task, judge.scale, fitted[0], inside)
        left = (settings.seconds or 0) - (time.perf_counter() - began) - len(SHARES) * judge.seconds
        for place, progress in _places(fitted, task, settings, left, generator):
            index, start = place
            piece = task.take(fitted[index], slice(start, start + settings.batch))
            piece = piece if augment is None else augment(piece, generator)
            descent.step(piece, None if augment else place, settings.step * _height(progress))
        return {"steps": descent.steps, **descent.finish(judge)}


def _height(progress: float) -> float:
    """Share of the largest step: rises in a line, then falls as half a cosine."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2


def _places(
    batches: Sequence[Any], task: Task, settings: Distilling, seconds: float, generator: torch.Generator
) -> Iterator[tuple[tuple[int, int], float]]:
    """Batches and where parts of them start, in a new order in each epoch; how much is over of the time or the epochs.

    The step ahead is counted in: by half where it says how far, whole where the time is up.
    """
    places = [
        (index, start) for index, batch in enumerate(batches) for start in range(0, task.size(batch), settings.batch)
    ]
    steps = math.ceil((settings.epochs or 0) * len(places))
    began, step = time.perf_counter(), 0
    while True:
        for chosen in torch.randperm(len(places), generator=generator).tolist():
            pace = (time.perf_counter() - began) / max(step, 1)
            if (step >= steps) if settings.epochs else ((step + 1) * pace >= seconds):
                return
            yield places[chosen], (step + 0.5) / steps if settings.epochs else (step + 0.5) * pace / seconds
            step += 1


class _Judge:
    """The distortion of the prediction on held-out samples.

    Attributes:
        scale: one over the variance of the original's prediction.
        before: at the start.
        seconds: that judging takes.
    """

    def __init__(self, original: nn.Module, reduced: nn.Module, task: Task, held_out: Sequence[Any]) -> None:
        self.reduced, self.task, self.held_out = reduced, task, held_out
        self.wanted, spread = self._predictions(original), Spread()
        for values in self.wanted:
            spread.add(values)
        self.scale = 1 / max(spread.variance(), torch.finfo(torch.float32).tiny)
        began = time.perf_counter()
        self.before = self()
        self.seconds = time.perf_counter() - began

    def __call__(self) -> float:
        """Of the network as it is."""
        pairs = zip(self.wanted, self._predictions(self.reduced), strict=True)
        squared = sum(float((wanted - found).square().sum()) for wanted, found in pairs)
        return self.scale * squared / sum(map(len, self.wanted))

    def _predictions(self, model: nn.Module) -> list[Tensor]:
        """Of the held-out samples, float64, batch by batch."""
        with torch.no_grad():
            batches = (self.task.to(batch, self.reduced) for batch in self.held_out)
            return [_predict(self.task, model, batch).double() for batch in batches]


class _Descent:
    """The state of one repair: where parameters began, and how far they are, in units of a step."""

    def __init__(
        self, original: nn.Module, reduced: nn.Module, task: Task, scale: float, first: Any, inside: ExitStack
    ) -> None:
        self.original, self.reduced, self.task, self.scale, self.steps = original, reduced, task, scale, 0
        named = {n: p for n, p in reduced.named_parameters() if p.requires_grad and p.is_floating_point()}
        first = task.to(first, reduced)
        units = step_units(reduced, lambda: task.run(reduced, first))
        self.parameters, self.units = list(named.values()), [units[name] for name in named]
        self.start = [p.detach().clone() for p in self.parameters]
        self.moves = [torch.zeros_like(value) for value in self.start]
        self.optimizer = torch.optim.Adam(self.moves, eps=1e-12)
        self.stages = find_stages(original, reduced, lambda model: task.run(model, first))
        self.heard = {model: inside.enter_context(hearing(model, self.stages)) for model in (original, reduced)}
        self.known: dict[tuple[int, int], list[Tensor]] = {}
        self.room = KEPT

    def step(self, piece: Any, place: tuple[int, int] | None, size: float) -> None:
        """One step; what the original gives for a place is computed once, where there is room for it."""
        self.steps += 1
        batch = self.task.to(piece, self.reduced)
        (wanted, *wanted_maps), (found, *maps) = self._wanted(batch, place), self._given(self.reduced, batch)
        loss = self.scale * (found - wanted).square().sum(1).mean()
        for stage, values, targets in zip(self.stages.values(), maps, wanted_maps, strict=True):
            loss = loss + STAGES * stage.loss(values, targets)
        gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        for move, unit, gradient in zip(self.moves, self.units, gradients, strict=True):
            move.grad = unit * gradient
        self.optimizer.param_groups[0]["lr"] = size
        self.optimizer.step()
        self._go(1.0)

    def _given(self, model: nn.Module, batch: Any) -> list[Tensor]:
        """Prediction [B, D], and what each stage gives."""
        prediction = _predict(self.task, model, batch)
        return [prediction, *(self.heard[model][name] for name in self.stages)]

    def _wanted(self, batch: Any, place: tuple[int, int] | None) -> list[Tensor]:
        """The same of the original."""
        if place is not None and place in self.known:
            return self.known[place]
        with torch.no_grad():
            wanted = self._given(self.original, batch)
        values = sum(part.numel() for part in wanted)
        if place is not None and values <= self.room:
            self.room -= values
            self.known[place] = wanted
        return wanted

    def finish(self, judge: _Judge) -> dict[str, float]:
        """Goes the share of the way that serves held-out samples best."""
        found = {0.0: judge.before}
        for share in SHARES if self.steps else ():
            self._go(share)
            found[share] = judge()
        share = min((share for share in found if math.isfinite(found[share])), key=found.__getitem__, default=0.0)
        self._go(share)
        return {"share": share, "distortion_before": judge.before, "distortion_after": found[share]}

    def _go(self, share: float) -> None:
        with torch.no_grad():
            for parameter, start, unit, move in zip(self.parameters, self.start, self.units, self.moves, strict=True):
                parameter.copy_(start + share * unit * move if share else start)


def _predict(task: Task, model: nn.Module, batch: Any) -> Tensor:
    """[B, D]."""
    values = task.compared(task.run(model, batch))
    return values.reshape(len(values), -1)
