"""Figure and loss of a network over batches, as sums that add across ranks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.running import undisturbed
from lit_prune.task import Task, settle


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        figure: the task's figure.
        loss: mean loss of a sample, nats for a classifier; NaN without targets.
        images: number of samples.
        metric: name of the figure, such as `accuracy` (in 0..1).
        higher_is_better: of the figure.
    """

    figure: float
    loss: float
    images: int
    metric: str = "accuracy"
    higher_is_better: bool = True


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    reduce: Callable[[Tensor], Tensor] | None = None,
    task: Task | str | None = None,
) -> Evaluation:
    """The task's figure and mean loss of `model` in evaluation mode; the model is left as found.

    Args:
        model: any network.
        batches: what the task reads, such as (images, labels).
        reduce: sums a float64 tensor over ranks, each of which calls this; None where this process has all samples.
        task: what a batch and an output mean; None recognises it.

    Raises:
        InputError: no batches, or as `settle`; on every rank where it is so on one.
    """
    refusal: InputError | None = None
    added: tuple[Task, Tensor, Tensor] | None = None
    try:
        added = _add_up(model, batches, task)
    except InputError as error:
        refusal = error
    refused = 0.0 if reduce is None else float(reduce(torch.tensor([float(refusal is not None)]).double()))
    if refusal is not None:
        raise refusal
    if refused or added is None:
        raise InputError(f"evaluation: {refused:.0f} other ranks refused their samples; their own line says why")
    known, sums, ends = added
    together = torch.cat([sums.flatten(), ends.to(sums.device)]).cpu()  # the one time that it waits for the device
    together = together if reduce is None else reduce(together)
    figure = known.figure(together[:-2].reshape(sums.shape))
    return Evaluation(
        figure, float(together[-2] / together[-1]), int(together[-1]), known.metric_name, known.higher_is_better
    )


def _add_up(model: nn.Module, batches: Iterable[Any], given: Task | str | None) -> tuple[Task, Tensor, Tensor]:
    """The task, sums of its figure, and the summed loss with the number of samples [2]."""
    task, batches = settle(given, model, batches)
    sums: Tensor | None = None
    losses: list[Tensor] = []
    nothing = torch.tensor(torch.nan, dtype=torch.float64)  # the loss of a task that has none
    count = 0
    with undisturbed(model):
        for batch in batches:
            for piece in task.pieces(batch):
                piece = task.to(piece, model)
                output = task.run(model, piece)
                found = task.metric(output, piece)
                sums = found if sums is None else sums + found
                known = task.default_variable(piece) is not None
                losses.append(task.losses(output, piece).double().sum() if known else nothing)
                count += task.size(piece)
    if sums is None:
        raise InputError("evaluation got no batches: give at least one")
    loss = torch.stack(losses).sum()
    return task, sums, torch.stack([loss, loss.new_tensor(count)])
