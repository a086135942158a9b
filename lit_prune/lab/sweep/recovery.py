"""The short training after pruning that every cell of a sweep gets alike."""

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.data import ImageData
from lit_prune.errors import InputError
from lit_prune.task import Classification

PRECISIONS = ("32-true", "bf16-mixed")


def precision_context(precision: str, device: torch.device) -> AbstractContextManager:
    """Context that a forward pass runs in. InputError: a precision that a sweep does not know."""
    if precision not in PRECISIONS:
        raise InputError(f"trainer.precision={precision!r} is not one of {', '.join(PRECISIONS)}, which a sweep knows")
    return nullcontext() if precision == "32-true" else torch.autocast(device.type, torch.bfloat16)


def training_batches(data: ImageData, epochs: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented training batches of `epochs` epochs, `limit` at the most; a function of the data's seed alone."""

    def all_epochs() -> Iterator[tuple[Tensor, Tensor]]:
        loader = data.train_dataloader()
        for epoch in range(epochs):
            loader.sampler.set_epoch(epoch)
            yield from loader

    return itertools.islice(all_epochs(), limit)


def make_optimizer(model: nn.Module, fields: dict[str, Any]) -> torch.optim.Optimizer:
    """Optimizer of a recovery with a constant learning rate; `fields` as `SweepRequest.recovery_fields`."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if fields["optimizer"] == "adam":
        return torch.optim.Adam(parameters, lr=fields["lr"], weight_decay=fields["weight_decay"])
    return torch.optim.SGD(
        parameters, lr=fields["lr"], momentum=fields["momentum"], weight_decay=fields["weight_decay"]
    )


def recover(model: nn.Module, data: ImageData, fields: dict[str, Any], precision: str, seed: int) -> Iterator[int]:
    """Trains `model` in place with cross-entropy; yields the number of batches done at each check and at the end.

    The learning rate is constant, so the network at a check is the one that a recovery of so many batches gives.

    Args:
        model: the pruned network.
        data: gives the training batches.
        fields: optimizer, lr, momentum, weight_decay, epochs, max_batches, recovery_checks.
        precision: see `precision_context`.
        seed: of what is random inside the network, such as dropout.

    Raises:
        RuntimeError: the loss is not finite.
    """
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, fields)
    torch.manual_seed(seed)
    broken, done, task = torch.zeros((), dtype=torch.bool, device=device), 0, Classification()
    for batch in training_batches(data, fields["epochs"], fields["max_batches"]):
        model.train()
        batch = task.to(batch, model)
        with precision_context(precision, device):
            loss = task.loss(task.run(model, batch), batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        broken |= ~torch.isfinite(loss.detach())
        done += 1
        if done in fields["recovery_checks"]:
            yield done
    if broken:
        raise RuntimeError(f"the loss was NaN or infinite within {done} batches of {fields['optimizer']}")
    yield done
