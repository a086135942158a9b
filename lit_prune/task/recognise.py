"""Which task a network and its batches are of."""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError, first_line
from lit_prune.running import check_visible, undisturbed
from lit_prune.task.base import TASKS, Task
from lit_prune.task.batches import HOW_TO_GIVE, describe, find_layout, forward_parameters
from lit_prune.task.unlabelled import Unlabelled

SAMPLES = 2  # run to see what the network gives


def settle(task: Task | str | None, model: nn.Module, batches: Iterable[Any]) -> tuple[Task, Iterable[Any]]:
    """The task that was asked for, else the recognised one, and batches that still hold all of theirs.

    Args:
        task: a task, a name of `TASKS`, or None: recognised from the first batch.
        model: the network; left as found.
        batches: read up to the first batch where `task` is None.

    Raises:
        InputError: an unknown name, no batch, or as `recognise` and `check_visible`.
    """
    check_visible(model)
    if task is not None:
        found = find_task(task)
        found.parameters = forward_parameters(model)
        return found, batches
    first, batches = peek(batches)
    return recognise(model, first), batches


def find_task(task: Task | str) -> Task:
    """A task, or a new one by its name or `package.module:Class`.

    Raises:
        InputError: there is none of that name, or it is no task.
    """
    return task if isinstance(task, Task) else TASKS.make(task)


def peek(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and batches that still contain it (an iterator is not lost).

    Raises:
        InputError: there is no batch.
    """
    with torch.random.fork_rng(devices=[]):  # iterating a DataLoader draws from torch's global generator
        iterator = iter(batches)
        first = next(iterator, None)
    if first is None:
        raise InputError("batches: there is no batch in it; give at least one")
    return first, itertools.chain([first], iterator) if iterator is batches else batches


def recognise(model: nn.Module, batch: Any) -> Task:
    """The task of a network and a batch: the one of `TASKS` that fits what the network answers to two samples.

    With targets that fit none it is `Unlabelled`, which refuses where a loss is needed and says what was found.

    Args:
        model: the network; it is run in evaluation mode and left as found.
        batch: a batch of a usual kind, see `find_layout`.

    Raises:
        InputError: the batch is not recognised, or the network does not take it; the line says what was found.
    """
    reader = Unlabelled()
    reader.parameters = forward_parameters(model)
    few, output = try_out(reader, model, batch)
    target, size = telling(reader.target(batch), reader.target(few)), reader.size(few)
    fitting = (kind() for kind in TASKS.latest_first() if kind.fits(output, target, size))
    found = next(fitting, None) or Unlabelled(
        f"batches: the network answers {describe(output)} and the target is {describe(target)}, which is none of "
        f"{', '.join(TASKS)}; {HOW_TO_GIVE}"
    )
    found.parameters = reader.parameters
    return found


def telling(whole: Any, few: Any) -> Any:
    """As many rows of a target as those of a few samples: those that least say one class, or hold least 0 and 1 alone.

    Two samples with a label each may be of a set whose others have several.
    """
    if not isinstance(few, Tensor) or few.ndim < 2 or len(few) != SAMPLES or few.shape[1:] != whole.shape[1:]:
        return few
    rows = whole.detach().float()
    sums = (rows.sum(1) - 1).abs().reshape(len(rows), -1).amax(1)
    beyond = torch.minimum(rows.abs(), (rows - 1).abs()).reshape(len(rows), -1).amax(1)
    return whole[[int(sums.argmax()), int(beyond.argmax())]]


def try_out(reader: Task, model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """The first samples of a batch, and what the network answers to them in evaluation mode; it is left as found.

    Raises:
        InputError: the batch is not recognised, or empty, or the network does not take it.
    """
    find_layout(batch, reader.parameters)  # refuses what it does not know
    few = reader.to(reader.take(batch, SAMPLES), model)
    if not reader.size(few):
        raise InputError("batches: the first batch holds no images; leave it out")
    with undisturbed(model):
        try:
            return few, reader.run(model, few)
        except Exception as error:  # whatever somebody's code raises
            reason = first_line(error)
            raise InputError(
                f"batches: a batch is {describe(batch)}, which the network does not take ({reason}); {HOW_TO_GIVE}"
            ) from error
