"""BatchNorm recalibration: running statistics of the pruned network, measured anew."""

from collections.abc import Iterable
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
    dropout stays off, no gradient is kept, and modes and momenta are as before on return.

    Args:
        model: network whose BatchNorm layers are edited in place.
        batches: what the task reads; targets are not used.
        limit: batches used at the most.
        task: how a batch goes through the network; None takes the usual kinds of batches.

    Returns:
        Number of batches used; 0 for a network without BatchNorm.

    Raises:
        InputError: `batches` is empty, or `limit` is below 1.

    Source: m2m_dc section 3.3.
    """
    if limit < 1:
        raise InputError(f"recalibration needs limit >= 1, got limit={limit}")
    task = Unlabelled() if task is None else find_task(task)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # None is torch's cumulative average
        norm.train()
    used = 0
    try:
        for batch in islice(batches, limit):
            task.run(model, task.to(batch, model))
            used += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    if not used:
        raise InputError("recalibration got no batches: give at least one")
    return used
