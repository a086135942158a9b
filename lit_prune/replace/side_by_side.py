"""The original network and the reduced one, run side by side to the layers that are solved."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from torch import nn

from lit_prune.measurement.layers import removing, without_gradients
from lit_prune.replace.walk import AtStop, Stop, Walk, watching
from lit_prune.task import Task

WAITING = 1 << 28  # bytes that the batches waiting at a stop have at hand there; they hold about three times as much
LEAST_WAITING = 4  # batches, of at most `slopes.MOST_SAMPLES` samples


@dataclass(frozen=True)
class Pair:
    """The original network and the reduced one, the latter changed in place, and the task that runs them."""

    original: nn.Module
    reduced: nn.Module
    task: Task


CallsOfBoth = Iterable[tuple[AtStop, AtStop]]
"""What both networks have at hand at a layer, for each of its calls."""


def walked(
    pair: Pair, stops: Sequence[Stop], batches: Sequence[Any]
) -> Iterator[tuple[Stop, int, Iterable[CallsOfBoth]]]:
    """Stops of one pass of both networks over the batches: solve each before the next is asked for.

    Large maps give many positions an image, so that fewer images do: at each stop only as many batches wait as hold
    `WAITING` bytes there. The others start when the maps have become small enough, through the layers that are solved.

    Yields:
        The stop, the number of batches that wait there (the first ones), and what they have at hand.
    """
    table = {stop.layer: stop for stop in stops}
    with (
        watching(pair.original, pair.task, table, before=False) as start_original,
        watching(pair.reduced, pair.task, table, before=True) as start_reduced,
    ):
        waiting: list[tuple[Walk, Walk]] = []

        def at(place: int, batch: int) -> CallsOfBoth:
            """What a batch has at hand at a stop; it is started where it has not been."""
            if batch < len(waiting):
                original, reduced = waiting[batch]
                return [(_at(original, stops[place]), _at(reduced, stops[place]))]
            waiting.append((start_original(batches[batch]), start_reduced(batches[batch])))
            for stop in stops[:place]:
                for walk in waiting[batch]:
                    walk.advance(stop.layer)
            return at(place, batch)

        for place, stop in enumerate(stops):
            first = at(place, 0)
            count = min(len(batches), max(LEAST_WAITING, WAITING // max(1, _held(first))))
            for walk in chain(*waiting[count:]):
                walk.close()
            del waiting[count:]
            yield stop, count, chain([first], (at(place, batch) for batch in range(1, count)))
            del first


def _at(walk: Walk, stop: Stop) -> AtStop:
    """What a pass has at hand at a stop."""
    seen = walk.advance(stop.layer)
    assert seen is not None, "only the end of a pass has nothing"
    return seen


def _held(calls: CallsOfBoth) -> int:
    """Bytes of what a batch has at hand."""
    values = (value for call in calls for seen in call for value in (seen.inputs, seen.output, seen.other))
    return sum(value.numel() * value.element_size() for value in values if value is not None)


def passed(
    pair: Pair, stops: Sequence[Stop], batches: Sequence[Any]
) -> Iterator[tuple[Stop, int, Iterable[CallsOfBoth]]]:
    """The same by a pass for each layer, for layers that run several times and those behind; sums are not corrected."""
    for stop in stops:
        both = [partial(_calls, network, stop.layer, pair.task) for network in (pair.original, pair.reduced)]
        calls = (zip(*(call(batch) for call in both), strict=True) for batch in batches)
        yield replace(stop, joined=False, clip=None), len(batches), calls


def _calls(model: nn.Module, layer: str, task: Task, batch: Any) -> list[AtStop]:
    """What a layer reads and writes in each of its calls."""
    found: list[AtStop] = []
    hook = lambda module, args, output: found.append(AtStop(args[0], output.clone()))  # noqa: E731
    with removing([model.get_submodule(layer).register_forward_hook(hook)]), without_gradients():
        task.run(model, task.to(batch, model))
    return found
