"""BatchNorm recalibration: running statistics of the pruned network, measured anew."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.running import modes_kept
from lit_prune.task import Task, Unlabelled, find_task, peek, try_out


@torch.no_grad()
@checked
def recalibrate_batchnorm(
    model: nn.Module, batches: Iterable[Any], limit: int = 50, *, task: Task | str | None = None
) -> int:
    """Replaces the running statistics of every BatchNorm by their cumulative average over `batches`.

    The statistics start from nothing: an exponential average that starts from the dense network's values keeps part of
    them, and accuracy can then stay at chance. Feed samples of the *training distribution* (augmented): on clean images
    the statistics fit a distribution that the weights were never trained for. Only the norm layers are in train mode;
    dropout stays off, no gradient is kept, and modes and momenta are as before on return. A batch of one sample after
    larger ones is left out. Where anything goes wrong the statistics are those from before.

    >>> norm = nn.BatchNorm2d(1)
    >>> recalibrate_batchnorm(norm, [torch.full((4, 1, 2, 2), 3.0)]), norm.running_mean.item()
    (1, 3.0)

    Args:
        model: network whose BatchNorm layers are edited in place.
        batches: what the task reads; targets are not used.
        limit: batches used at the most.
        task: how a batch goes through the network; None takes the usual kinds of batches.

    Returns:
        Number of batches used; 0 for a network without BatchNorm.

    Raises:
        InputError: `batches` is empty, holds NaN or infinity, or batches of one sample that a norm cannot be measured
            on; or `limit` is below 1.

    Source: m2m_dc section 3.3.
    """
    if limit < 1:
        raise InputError(f"recalibration needs limit >= 1, got limit={limit}")
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}
    if not norms:
        return 0
    if task is None:
        first, batches = peek(batches)
        task = Unlabelled()
        try_out(task, model, first)
    task = find_task(task)
    with _measuring(model, norms.values()):
        used = 0
        for place, batch in enumerate(_worthwhile(islice(batches, limit), task)):
            _run(model, batch, task, place)
            _check_finite(norms, place)
            used += 1
        if not used:
            raise InputError("recalibration got no batches: give at least one")
    return used


def _worthwhile(batches: Iterable[Any], task: Task) -> Iterator[Any]:
    """The batches, without those of one sample that come after larger ones."""
    largest = 0
    for batch in batches:
        size = task.size(batch)
        largest = max(largest, size)
        if size > 1 or (size and largest <= 1):
            yield batch


def _run(model: nn.Module, batch: Any, task: Task, place: int) -> None:
    try:
        task.run(model, task.to(batch, model))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"recalibration: batch {place} has one sample, too few for the norm behind pooling; give larger batches"
        ) from error


def _check_finite(norms: Mapping[str, nn.Module], place: int) -> None:
    """Raises InputError where a statistic is NaN or infinite; waits for the device."""
    sums = torch.stack([norm.running_mean.sum() + norm.running_var.sum() for norm in norms.values()])
    if not sums.isfinite().all():
        first = list(norms)[int(sums.isfinite().logical_not().nonzero()[0])]
        raise InputError(
            f"recalibration: batch {place} makes the statistics of {first} NaN or infinite; mend the data (those from "
            "before are kept)"
        )


@contextmanager
def _measuring(model: nn.Module, norms: Iterable[nn.Module]) -> Iterator[None]:
    """The norms start anew and average over what they see; on an exception their statistics are as before."""
    norms = list(norms)
    before = [(norm, norm.momentum, {key: value.clone() for key, value in norm.named_buffers()}) for norm in norms]
    with modes_kept(model):
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            vars(norm)["momentum"] = None  # None is torch's cumulative average
            norm.train()
        try:
            yield
        except BaseException:
            for norm, _, statistics in before:
                for key, value in norm.named_buffers():
                    value.copy_(statistics[key])
            raise
        finally:
            for norm, momentum, _ in before:
                norm.momentum = momentum
