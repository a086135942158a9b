"""BatchNorm recalibration: running statistics of the pruned network, measured anew."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_prune.errors import InputError
from lit_prune.task import Task, Unlabelled, find_task


@torch.no_grad()
def recalibrate_batchnorm(
    model: nn.Module, batches: Iterable[Any], limit: int = 50, *, task: Task | str | None = None
) -> int:
    """Replaces the running statistics of every BatchNorm by their cumulative average over `batches`.

    The statistics are reset first: an exponential average that starts from the dense network's values keeps part of
    them, and accuracy can then stay at chance. Feed images of the *training distribution* (augmented): on clean images
    the statistics fit a distribution that the weights were never trained for. Only the norm layers are in train mode;
    dropout stays off, no gradient is kept, and modes and momenta are as before on return. Batches count alike; a batch
    of one image after larger ones is left out: it is what is left of a data set, and behind pooling it has no variance.
    Whatever goes wrong, the network keeps the statistics that it had.

    Args:
        model: network whose BatchNorm layers (of any dimension, synchronised ones too) are edited in place.
        batches: what the task reads; targets are not used.
        limit: batches used at the most.
        task: how a batch goes through the network; None takes the usual kinds of batches.

    Returns:
        Number of batches used; 0 for a network without BatchNorm.

    Raises:
        InputError: `batches` is empty, `limit` is below 1, a batch makes statistics that are not finite, or a norm
            needs more than one image and gets no more.

    Source: m2m_dc section 3.3.
    """
    if limit < 1:
        raise InputError(f"recalibration needs limit >= 1, got limit={limit}")
    task = Unlabelled() if task is None else find_task(task)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}
    if not norms:
        return 0
    used, larger = 0, False
    with _averaging(model, list(norms.values())):
        for number, batch in enumerate(islice(batches, limit)):
            images = task.size(batch)
            if images == 1 and larger:
                continue
            _pass_through(model, task, batch, number)
            _check_finite(norms, number)
            used, larger = used + 1, larger or images > 1
        if not used:
            raise InputError("recalibration got no batches: give at least one")
    return used


@contextmanager
def _averaging(model: nn.Module, norms: list[nn.Module]) -> Iterator[None]:
    """The norms in train mode with empty cumulative averages; an exception gives them back their statistics."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # None is torch's cumulative average
            norm.train()
        yield
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for name, buffer in norm.named_buffers(recurse=False):
                buffer.copy_(buffers[name])
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode


def _pass_through(model: nn.Module, task: Task, batch: Any, number: int) -> None:
    try:
        task.run(model, task.to(batch, model))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"recalibration: batch {number} gives a norm one value a channel, which has no variance; give larger ones"
        ) from error


def _check_finite(norms: dict[str, nn.Module], number: int) -> None:
    """Raises where a statistic is NaN or infinite; asks the device once."""
    totals = torch.stack([norm.running_mean.sum() + norm.running_var.sum() for norm in norms.values()])
    for name, finite in zip(norms, totals.isfinite().tolist(), strict=True):
        if not finite:
            raise InputError(
                f"recalibration: batch {number} makes NaN or infinite statistics in norm {name!r}, which keeps "
                "those it had; mend the data or the network"
            )
